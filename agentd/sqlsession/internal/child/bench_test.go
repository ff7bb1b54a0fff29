package child

import (
	"bytes"
	"context"
	"io"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"
)

// repeated gives a text, a part n times, and another text.
type repeated struct {
	head, part, tail []byte
	n, at            int
}

func (r *repeated) Read(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		switch {
		case len(r.head) > 0:
			k := copy(p[n:], r.head)
			r.head = r.head[k:]
			n += k
		case r.n > 0:
			k := copy(p[n:], r.part[r.at:])
			n += k
			if r.at += k; r.at == len(r.part) {
				r.at = 0
				r.n--
			}
		case len(r.tail) > 0:
			k := copy(p[n:], r.tail)
			r.tail = r.tail[k:]
			n += k
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
	return n, nil
}

type discardConn struct{ script }

func (d *discardConn) Write(p []byte) (int, error) { return len(p), nil }

// BenchmarkRows is the way of a row from the socket's buffer to the frames:
// int8, 20 characters, float8, timestamptz.
func BenchmarkRows(b *testing.B) {
	row := encode(&pgproto3.DataRow{Values: [][]byte{make([]byte, 8), bytes.Repeat([]byte("x"), 20), make([]byte, 8), make([]byte, 8)}})
	b.ReportAllocs()
	out := newSink(&discardConn{})
	s := &session{wire: newWire(&script{Reader: &repeated{head: prepared(20, 25, 701, 1184), part: bytes.Repeat(row, 1000), n: b.N/1000 + 1, tail: finale}}, map[string]string{}), sink: out, network: "test", parser: known{}}
	st := newStatement(func(context.Context) error { return nil })
	b.ResetTimer()
	r := running
	if done, _ := s.run(&r, st); done.Error != nil {
		b.Fatal(done.Error)
	}
	b.StopTimer()
	st.finish()
	out.close()
}
