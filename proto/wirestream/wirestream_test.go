package wirestream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/iotest"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// agent sends a request to a test server, whatever its URL says.
type agent struct{ server *httptest.Server }

func (a agent) Do(r *http.Request) (*http.Response, error) {
	r.URL.Host = strings.TrimPrefix(a.server.URL, "http://")
	return a.server.Client().Do(r)
}

func TestSession(t *testing.T) {
	want := &posternv1.WireRequest{SessionId: "wire_1", Source: "shop", Settings: []*posternv1.WireSetting{{Name: "TimeZone", Value: "UTC"}}}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got, err := ReadRequest(w, r)
		if err != nil {
			proto.WriteHTTPError(w, err)
			return
		}
		if got.Source == "other" {
			proto.WriteHTTPError(w, proto.Errorf(proto.CodeNotFound, "no data source %q", got.Source))
			return
		}
		if !gproto.Equal(got, want) {
			t.Errorf("request is %v, want %v", got, want)
		}
		conn, err := Accept(w)
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = conn.Close() }()
		out := NewWriter(conn)
		if err := out.Send(Opened, &posternv1.WireOpened{Parameters: []*posternv1.WireSetting{{Name: "server_version", Value: "17"}}}); err != nil {
			t.Error(err)
		}
		// It echoes what comes until it reads "bye".
		in := NewReader(conn)
		var all []byte
		for !bytes.HasSuffix(all, []byte("bye")) {
			if kind, err := in.Next(); err != nil || kind != Data {
				t.Errorf("server got %q, %v", byte(kind), err)
				return
			}
			var echo bytes.Buffer
			if err := in.CopyData(&echo); err != nil {
				t.Error(err)
				return
			}
			all = append(all, echo.Bytes()...)
			b := AppendHeader(nil, Data, echo.Len())
			if err := out.Raw(append(b, echo.Bytes()...)); err != nil {
				t.Error(err)
			}
		}
		if err := out.Send(End, &posternv1.WireEnd{Told: true}); err != nil {
			t.Error(err)
		}
	}))
	defer server.Close()

	stream, err := Dial(context.Background(), agent{server}, want)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stream.Close() }()
	in, out := NewReader(stream), NewWriter(stream)
	var opened posternv1.WireOpened
	if kind, err := in.Next(); err != nil || kind != Opened || in.Message(&opened) != nil || opened.Parameters[0].Value != "17" {
		t.Fatalf("first frame is %q, %v, %v", byte(kind), &opened, err)
	}
	sent := strings.Repeat("0123456789", 100_000) + "bye"
	pumped := make(chan error, 1)
	go func() { pumped <- out.Pump(strings.NewReader(sent), make([]byte, HeaderSize+100_000)) }()
	var got bytes.Buffer
	for {
		kind, err := in.Next()
		if err != nil {
			t.Fatal(err)
		}
		if kind == End {
			var end posternv1.WireEnd
			if err := in.Message(&end); err != nil || !end.Told {
				t.Errorf("end is %v, %v", &end, err)
			}
			break
		}
		if err := in.CopyData(&got); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-pumped; err != nil {
		t.Errorf("pump: %v", err)
	}
	if got.String() != sent {
		t.Errorf("%d bytes came back, not the %d sent", got.Len(), len(sent))
	}
	if _, err := in.Next(); err != io.EOF {
		t.Errorf("after the end: %v, want EOF", err)
	}

	_, err = Dial(context.Background(), agent{server}, &posternv1.WireRequest{Source: "other"})
	if proto.CodeOf(err) != proto.CodeNotFound || err.Error() != `no data source "other"` {
		t.Errorf("refusal is %v", err)
	}
	_, err = Dial(context.Background(), agent{server}, &posternv1.WireRequest{Source: strings.Repeat("x", MaxRequest)})
	if proto.CodeOf(err) != proto.CodeBodyTooLarge {
		t.Errorf("large request: %v", err)
	}
	response, err := http.Post(server.URL, "application/protobuf", strings.NewReader(""))
	if err != nil {
		t.Fatal(err)
	}
	if err := proto.ReadHTTPError(response); proto.CodeOf(err) != proto.CodeInvalid {
		t.Errorf("without an upgrade: %v", err)
	}
	_ = response.Body.Close()
}

func TestMalformed(t *testing.T) {
	frame := func(kind Type, n int) []byte { return append(AppendHeader(nil, kind, n), make([]byte, n)...) }
	for name, c := range map[string]struct {
		in   []byte
		want error
	}{
		"nothing":           {nil, io.EOF},
		"half a header":     {[]byte("d\x00\x00"), io.ErrUnexpectedEOF},
		"half a frame":      {frame(Data, 10)[:9], io.ErrUnexpectedEOF},
		"unknown":           {frame('x', 0), ErrMalformed},
		"too much data":     {frame(Data, MaxData+1), ErrMalformed},
		"too long an event": {frame(Event, MaxMessage+1), ErrMalformed},
		"no event":          {append(AppendHeader(nil, Event, 2), 0xff, 0xff), ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			d := NewReader(iotest.OneByteReader(bytes.NewReader(c.in)))
			var err error
			for err == nil {
				var kind Type
				if kind, err = d.Next(); err == nil && kind != Data {
					err = d.Message(&posternv1.WireEvent{})
				}
			}
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	if _, err := AppendMessage(nil, Event, &posternv1.WireEvent{Sql: strings.Repeat("x", MaxMessage)}); !errors.Is(err, ErrMalformed) {
		t.Errorf("an event that is too long: %v", err)
	}
	largest := &posternv1.WireEvent{Sql: strings.Repeat("x", MaxText), Error: &posternv1.ErrorDetail{Message: strings.Repeat("x", 32<<10)}}
	if _, err := AppendMessage(nil, Event, largest); err != nil {
		t.Errorf("an event of the largest size: %v", err)
	}
}

// FuzzReader holds that a Reader neither panics nor takes more memory than its
// bound, and hands out what a Writer wrote.
func FuzzReader(f *testing.F) {
	f.Add(AppendHeader(nil, Data, 3))
	event, _ := AppendMessage(nil, Event, &posternv1.WireEvent{StatementId: "a", Sql: "select 1"})
	f.Add(append(append(event, AppendHeader(nil, Data, 1)...), 'x'))
	f.Add(AppendHeader(nil, End, 1<<30))
	f.Fuzz(func(t *testing.T, in []byte) {
		d := NewReader(bytes.NewReader(in))
		read := 0
		for {
			kind, err := d.Next()
			if err != nil {
				break
			}
			read += HeaderSize
			if kind != Data {
				before := d.Left()
				if d.Message(&posternv1.WireEvent{}) != nil {
					break
				}
				read += before
				continue
			}
			for d.Left() > 0 {
				chunk, err := d.Chunk()
				if err != nil {
					break
				}
				read += len(chunk)
			}
			if d.Left() > 0 {
				break
			}
		}
		if read > len(in) || len(d.buf) > HeaderSize+MaxData {
			t.Errorf("read %d of %d bytes with a buffer of %d", read, len(in), len(d.buf))
		}
	})
}
