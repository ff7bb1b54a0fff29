package frame

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestRoundTrip(t *testing.T) {
	value := "v"
	run := RunRequest{SQL: "select 'é'", Parameters: []Parameter{{Name: "a", Value: &value, Type: "int8"}, {Name: "b"}}, MaxRows: 1, MaxBytes: 2, TimeoutMillis: 3, ReadWrite: true}
	big := bytes.Repeat([]byte("x"), MaxData)
	var stream []byte
	for _, f := range []struct {
		t Type
		p any
	}{{Run, run}, {Data, big}, {Check, nil}, {Cancel, []byte{byte(TimedOut)}}} {
		b, err := Encode(f.t, f.p)
		if err != nil {
			t.Fatal(err)
		}
		stream = append(stream, b...)
	}
	for name, src := range map[string]io.Reader{"whole": bytes.NewReader(stream), "bytes": iotest.OneByteReader(bytes.NewReader(stream))} {
		t.Run(name, func(t *testing.T) {
			d := NewReader(src)
			expect := func(want Type) {
				t.Helper()
				if got, err := d.Next(); err != nil || got != want {
					t.Fatalf("got %q, %v, want %q", got, err, want)
				}
			}
			expect(Run)
			var got RunRequest
			if err := d.JSON(&got); err != nil || !reflect.DeepEqual(got, run) {
				t.Fatalf("got %+v, %v, want %+v", got, err, run)
			}
			expect(Data)
			var data []byte
			for d.Left() > 0 {
				chunk, err := d.Chunk()
				if err != nil {
					t.Fatal(err)
				}
				data = append(data, chunk...)
			}
			if !bytes.Equal(data, big) {
				t.Fatalf("got %d bytes, want %d", len(data), len(big))
			}
			expect(Check)
			expect(Cancel)
			if _, err := d.Next(); err != io.EOF { // the payload is passed over
				t.Fatalf("got %v, want EOF", err)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	tests := []struct {
		name   string
		stream string
		want   error
	}{
		{"unknown type", "?\x00\x00\x00\x00", ErrMalformed},
		{"too long", "X\x00\x00\x00\x02cc", ErrMalformed},
		{"huge", "d\xff\xff\xff\xff", ErrMalformed},
		{"cut header", "d\x00", io.ErrUnexpectedEOF},
		{"cut payload", "z\x00\x00\x00\x09{}", io.ErrUnexpectedEOF},
		{"no JSON", "z\x00\x00\x00\x02xx", ErrMalformed},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			d := NewReader(strings.NewReader(test.stream))
			_, err := d.Next()
			if err == nil {
				err = d.JSON(&DoneReply{})
			}
			if !errors.Is(err, test.want) {
				t.Fatalf("got %v, want %v", err, test.want)
			}
		})
	}
	if _, err := Encode(Data, make([]byte, MaxData+1)); !errors.Is(err, ErrMalformed) {
		t.Errorf("an oversized frame: got %v, want %v", err, ErrMalformed)
	}
}

func TestError(t *testing.T) {
	want := &proto.Error{
		Code: proto.CodeSQL, Message: "no",
		SQL: &posternv1.SQLErrorDetail{Sqlstate: "42601", Position: 3, Hint: "h", Detail: "d"},
	}
	got := FromError(want).Proto()
	if got.Code != want.Code || got.Message != want.Message || got.SQL.Position != 3 || got.SQL.Sqlstate != "42601" || got.SQL.Hint != "h" {
		t.Fatalf("got %+v, want %+v", got, want)
	}
	if FromError(nil) != nil || (*Error)(nil).Proto() != nil {
		t.Error("nil must stay nil")
	}
	if got := Clip("aé", 2); got != "a" {
		t.Errorf("Clip: got %q, want a", got)
	}
}

func FuzzReader(f *testing.F) {
	for t, payload := range map[Type]any{
		Connect: ConnectRequest{DSN: "x"}, Run: RunRequest{SQL: "s"}, Done: DoneReply{Error: &Error{}}, Data: []byte("abc"), Failed: FailedReply{},
		Checked: CheckedReply{Checks: []CheckResult{{}}}, Cancel: []byte("c"), Idle: nil,
	} {
		b, _ := Encode(t, payload)
		f.Add(append(b, b...))
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		d := NewReader(bytes.NewReader(stream))
		for range len(stream) + 1 {
			kind, err := d.Next()
			if err != nil {
				return
			}
			if d.Left() > limits[kind] {
				t.Fatalf("%q with %d bytes", kind, d.Left())
			}
			var v any
			switch kind {
			case Connect:
				v = &ConnectRequest{}
			case Run:
				v = &RunRequest{}
			case Done:
				v = &DoneReply{}
			case Failed:
				v = &FailedReply{}
			case Checked:
				v = &CheckedReply{}
			case Connected:
				v = &ConnectedReply{}
			default:
				continue
			}
			if d.JSON(v) != nil {
				return
			}
			if _, err := json.Marshal(v); err != nil {
				t.Fatal(err)
			}
		}
		t.Fatal("the reader does not end")
	})
}
