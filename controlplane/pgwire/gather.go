package pgwire

import (
	"net"
	"sync"
)

// gatherSize is how much goes out in one write below TLS, in bytes: TLS itself would
// make a write of each record of 16 KiB.
const gatherSize = 128 << 10

var gatherBuffers = sync.Pool{New: func() any { b := make([]byte, 0, gatherSize); return &b }}

// gather is a connection whose writes, between hold and flush, go out in large
// pieces. It holds gatherSize bytes in that time.
type gather struct {
	net.Conn

	mu     sync.Mutex // held during writes
	buffer *[]byte    // nil when nothing is held back
}

// Write implements net.Conn.
func (g *gather) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.buffer == nil {
		return g.Conn.Write(p)
	}
	if len(*g.buffer)+len(p) > cap(*g.buffer) {
		if err := g.outLocked(); err != nil {
			return 0, err
		}
		if len(p) > cap(*g.buffer) {
			return g.Conn.Write(p)
		}
	}
	*g.buffer = append(*g.buffer, p...)
	return len(p), nil
}

func (g *gather) outLocked() error {
	_, err := g.Conn.Write(*g.buffer)
	*g.buffer = (*g.buffer)[:0]
	return err
}

// hold begins to gather.
func (g *gather) hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.buffer == nil {
		g.buffer = gatherBuffers.Get().(*[]byte)
	}
}

// flush writes what was gathered and gathers no more.
func (g *gather) flush() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.buffer == nil {
		return nil
	}
	var err error
	if len(*g.buffer) > 0 {
		err = g.outLocked()
	}
	gatherBuffers.Put(g.buffer)
	g.buffer = nil
	return err
}
