package kernelstream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
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

func TestStream(t *testing.T) {
	want := &posternv1.KernelChannelsRequest{KernelId: "k", Client: "c", Resume: true, Principal: &posternv1.Principal{TokenId: "tok_1"}}
	large := bytes.Repeat([]byte("0123456789abcdef"), 20<<20/16)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got, err := ReadRequest(w, r)
		if err == nil && got.KernelId == "other" {
			err = proto.Errorf(proto.CodeNotFound, "no kernel %q", got.KernelId)
		}
		if err != nil {
			proto.WriteHTTPError(w, err)
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
		in, out := NewReader(conn), NewWriter(conn)
		for n := uint64(1); ; n++ {
			f, err := in.Next()
			if err != nil {
				t.Error(err)
				return
			}
			if f.GetConfirm() == 7 {
				break
			}
			if err := out.Send(&posternv1.KernelFrame{Frame: &posternv1.KernelFrame_Delivery{Delivery: &posternv1.KernelDelivery{Sequence: n, Message: f.GetSend()}}}); err != nil {
				t.Error(err)
			}
		}
		if err := out.End(proto.Errorf(proto.CodeUnavailable, "the kernel was stopped")); err != nil {
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
	sizes := []int{0, 1, 300, 100 << 10, len(large), 5}
	sent := make(chan error, 1)
	go func() {
		for _, n := range sizes {
			if err := out.Message(&posternv1.KernelMessage{Channel: "shell", Content: large[:n]}); err != nil {
				sent <- err
				return
			}
		}
		sent <- out.Confirm(7)
	}()
	for i, n := range sizes {
		f, err := in.Next()
		if err != nil {
			t.Fatal(err)
		}
		if d := f.GetDelivery(); d.GetSequence() != uint64(i+1) || !bytes.Equal(d.GetMessage().GetContent(), large[:n]) {
			t.Errorf("delivery %d has sequence %d and %d bytes, want %d", i, d.GetSequence(), len(d.GetMessage().GetContent()), n)
		}
	}
	f, err := in.Next()
	if err != nil {
		t.Fatal(err)
	}
	if err := EndError(f); proto.CodeOf(err) != proto.CodeUnavailable || err.Error() != "the kernel was stopped" {
		t.Errorf("the end says %v", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	if _, err := in.Next(); err != io.EOF {
		t.Errorf("after the end: %v, want EOF", err)
	}
	_, err = Dial(context.Background(), agent{server}, &posternv1.KernelChannelsRequest{KernelId: "other"})
	if proto.CodeOf(err) != proto.CodeNotFound || err.Error() != `no kernel "other"` {
		t.Errorf("refusal is %v", err)
	}
	_, err = Dial(context.Background(), agent{server}, &posternv1.KernelChannelsRequest{KernelId: strings.Repeat("x", MaxRequest)})
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

func TestEnd(t *testing.T) {
	if err := EndError(EndFrame(nil)); err != nil {
		t.Errorf("an end that was asked for: %v", err)
	}
	for _, text := range []string{"x", `{"code":"ERROR_CODE_OF_THE_FUTURE"}`, `{"message":"m"}`} {
		f := &posternv1.KernelFrame{Frame: &posternv1.KernelFrame_End{End: text}}
		if err := EndError(f); proto.CodeOf(err) != proto.CodeInternal {
			t.Errorf("%s: %v", text, err)
		}
	}
	if err := EndError(EndFrame(errors.New("secret"))); strings.Contains(err.Error(), "secret") {
		t.Errorf("the text of an inner error was sent: %v", err)
	}
}

func confirm(n uint64) []byte {
	b, err := Append(nil, &posternv1.KernelFrame{Frame: &posternv1.KernelFrame_Confirm{Confirm: n}})
	if err != nil {
		panic(err)
	}
	return b
}

func TestMalformed(t *testing.T) {
	for name, c := range map[string]struct {
		in   []byte
		want error
	}{
		"nothing":      {nil, io.EOF},
		"cut header":   {[]byte{0, 0}, io.ErrUnexpectedEOF},
		"cut payload":  {confirm(5)[:5], io.ErrUnexpectedEOF},
		"too long":     {[]byte{0xff, 0, 0, 0}, ErrMalformed},
		"empty":        {[]byte{0, 0, 0, 0}, ErrMalformed},
		"not protobuf": {[]byte{0, 0, 0, 1, 0xff}, ErrMalformed},
	} {
		for _, src := range []io.Reader{bytes.NewReader(c.in), iotest.OneByteReader(bytes.NewReader(c.in))} {
			if _, err := NewReader(src).Next(); !errors.Is(err, c.want) {
				t.Errorf("%s: %v, want %v", name, err, c.want)
			}
		}
	}
	_, err := Append(nil, &posternv1.KernelFrame{Frame: &posternv1.KernelFrame_Send{Send: &posternv1.KernelMessage{Content: make([]byte, MaxFrame)}}})
	if !errors.Is(err, ErrMalformed) {
		t.Errorf("a frame over the limit: %v", err)
	}
}

// A peer that announces much and sends little costs little.
func TestMemory(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	in := io.MultiReader(bytes.NewReader([]byte{4, 0, 0, 0}), bytes.NewReader(make([]byte, 100)))
	if _, err := NewReader(in).Next(); err != io.ErrUnexpectedEOF {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 4*step {
		t.Errorf("a length of 64 MiB made %d bytes", grown)
	}
	d := NewReader(bytes.NewReader(append(append([]byte{0, 0x80, 0, 0}, make([]byte, 8<<20)...), confirm(3)...)))
	if _, err := d.Raw(); err != nil {
		t.Fatal(err)
	}
	if f, err := d.Next(); err != nil || f.GetConfirm() != 3 {
		t.Fatalf("the frame after a large one: %v, %v", f, err)
	}
}

func FuzzReader(f *testing.F) {
	f.Add(append(confirm(1), confirm(1<<60)...))
	f.Add([]byte{0, 0, 0, 2, 8, 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		whole, slow := NewReader(bytes.NewReader(data)), NewReader(iotest.OneByteReader(bytes.NewReader(data)))
		for {
			a, errA := whole.Next()
			b, errB := slow.Next()
			if (errA == nil) != (errB == nil) || errA == nil && !gproto.Equal(a, b) {
				t.Fatalf("at once %v, %v; by bytes %v, %v", a, errA, b, errB)
			}
			if errA != nil {
				return
			}
			_ = EndError(a)
			again, err := Append(nil, a)
			if err != nil {
				t.Fatal(err)
			}
			if back, err := NewReader(bytes.NewReader(again)).Next(); err != nil || !gproto.Equal(back, a) {
				t.Fatalf("came back as %v, %v", back, err)
			}
		}
	})
}
