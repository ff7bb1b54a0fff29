package pgproxy

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"sync/atomic"
	"time"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto/wirestream"
)

// Frames to agentd beside those of package wirestream, with the same head.
const (
	// Intent has a WireEvent: the statement may write, and waits for Ack.
	Intent wirestream.Type = 'n'
	// Credit has four bytes, big endian: how much of the client's data was taken.
	Credit wirestream.Type = 'w'
)

// direct is from how many bytes on data are written from where they stand.
const direct = 16 << 10

// output gathers frames for agentd and writes them. It belongs to the proxy's
// goroutine; interrupt may be called from others.
type output struct {
	conn net.Conn
	buf  []byte
	// data is where in buf the head of the Data frame stands that is being filled;
	// -1: none.
	data int
	// late holds what could not be written when interrupt came: it goes first.
	late []byte
	// dropping is set by interrupt: from then on a write that would block keeps its
	// bytes in late instead. What is gathered meanwhile is bounded by its caller.
	dropping atomic.Bool
	err      error
}

func newOutput(conn net.Conn) *output { return &output{conn: conn, data: -1} }

// add appends bytes for the client.
func (o *output) add(p []byte) {
	for len(p) > 0 {
		if o.data < 0 {
			o.data = len(o.buf)
			o.buf = append(o.buf, byte(wirestream.Data), 0, 0, 0, 0)
		}
		k := min(len(p), wirestream.MaxData-(len(o.buf)-o.data-wirestream.HeaderSize))
		o.buf = append(o.buf, p[:k]...)
		p = p[k:]
		if len(o.buf)-o.data-wirestream.HeaderSize == wirestream.MaxData {
			o.endData()
		}
	}
}

func (o *output) endData() {
	if o.data >= 0 {
		binary.BigEndian.PutUint32(o.buf[o.data+1:], uint32(len(o.buf)-o.data-wirestream.HeaderSize))
		o.data = -1
	}
}

// message appends a frame of another kind.
func (o *output) message(t wirestream.Type, m gproto.Message) error {
	o.endData()
	var err error
	o.buf, err = wirestream.AppendMessage(o.buf, t, m)
	return err
}

func (o *output) credit(n int) {
	o.endData()
	o.buf = wirestream.AppendHeader(o.buf, Credit, 4)
	o.buf = binary.BigEndian.AppendUint32(o.buf, uint32(n))
}

// addDirect is add and flush of a long piece, b[from:to], without a copy. b has at
// least HeaderSize bytes before from that are of no use any more.
func (o *output) addDirect(b []byte, from, to int) {
	o.flush()
	for from < to {
		n := min(to-from, wirestream.MaxData)
		head := from - wirestream.HeaderSize
		b[head] = byte(wirestream.Data)
		binary.BigEndian.PutUint32(b[head+1:], uint32(n))
		o.write(b[head : from+n])
		from += n
	}
}

// flush writes what was gathered.
func (o *output) flush() {
	o.endData()
	if len(o.buf) > 0 {
		o.write(o.buf)
		if cap(o.buf) > 4*direct {
			o.buf = nil
		}
		o.buf = o.buf[:0]
	}
}

func (o *output) write(p []byte) {
	if o.err != nil {
		return
	}
	if len(o.late) > 0 {
		o.late = append(o.late, p...)
		return
	}
	n, err := o.conn.Write(p)
	if err != nil && errors.Is(err, os.ErrDeadlineExceeded) && o.dropping.Load() {
		o.late = append(o.late, p[n:]...)
		return
	}
	o.err = err
}

// interrupt unblocks a write under way.
func (o *output) interrupt() {
	o.dropping.Store(true)
	_ = o.conn.SetWriteDeadline(time.Now().Add(-time.Second))
}

// resume undoes interrupt and writes what is late, however long that takes.
func (o *output) resume() {
	if !o.dropping.Load() {
		return
	}
	_ = o.conn.SetWriteDeadline(time.Time{})
	o.dropping.Store(false)
	late := o.late
	o.late = nil
	if len(late) > 0 {
		o.write(late)
	}
}
