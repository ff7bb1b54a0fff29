package child

import (
	"net"
	"sync"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
)

// sinkBuffers is how many frames are filled, waiting or being written: with
// three, rows are gathered while one frame is on its way.
const sinkBuffers = 3

// queueLength leaves room for a Progress frame behind each Data frame, and for
// what ends a statement: queueing itself never waits.
const queueLength = 4 * sinkBuffers

// sink writes frames to agentd from a goroutine of its own. Write gathers
// bytes into Data frames. When all buffers are full it waits; that is the
// back-pressure.
type sink struct {
	conn  net.Conn
	queue chan []byte // what the goroutine writes; queueLength at most
	free  chan []byte // empty buffers
	done  sync.WaitGroup

	cur []byte // with room for the header in front
	// total and submitted count bytes of the statement's stream.
	total, submitted uint64
	// synced is signalled when run has come to a nil buffer: see drain.
	synced chan struct{}
	broken bool // conn has failed; run's alone, but between drain and the next send
	// wait, when set, is called instead of waiting for a free buffer; it must
	// receive from free.
	wait func(free <-chan []byte) []byte
}

func newSink(conn net.Conn) *sink {
	s := &sink{conn: conn, queue: make(chan []byte, queueLength), free: make(chan []byte, sinkBuffers), synced: make(chan struct{})}
	for range sinkBuffers {
		s.free <- nil // made when needed: most statements are small
	}
	s.done.Add(1)
	go s.run()
	return s
}

func (s *sink) run() {
	defer s.done.Done()
	for b := range s.queue {
		if b == nil {
			s.synced <- struct{}{}
			continue
		}
		if !s.broken {
			// agentd has gone: the goroutine that reads its frames notices, too.
			_, err := s.conn.Write(b)
			s.broken = err != nil
		}
		if frame.Type(b[0]) == frame.Data {
			s.free <- b[:0]
		}
	}
}

// drain waits until everything that was sent is written, or lost. Until the next send
// conn and broken are the caller's.
func (s *sink) drain() {
	s.queue <- nil
	<-s.synced
}

// Write gathers stream bytes; it never fails.
func (s *sink) Write(p []byte) (int, error) {
	n := len(p)
	s.total += uint64(n)
	for len(p) > 0 {
		if s.cur == nil {
			s.cur = s.takeFree()
		}
		k := min(len(p), frame.HeaderSize+frame.MaxData-len(s.cur))
		s.cur = append(s.cur, p[:k]...)
		p = p[k:]
		if len(s.cur) == frame.HeaderSize+frame.MaxData {
			s.submit()
		}
	}
	return n, nil
}

func (s *sink) takeFree() []byte {
	var b []byte
	select {
	case b = <-s.free:
	default:
		if s.wait != nil {
			b = s.wait(s.free)
		} else {
			b = <-s.free
		}
	}
	return append(b, make([]byte, frame.HeaderSize)...)
}

// flush sends what was gathered.
func (s *sink) flush() {
	if len(s.cur) > frame.HeaderSize {
		s.submit()
	}
}

func (s *sink) submit() {
	size := len(s.cur) - frame.HeaderSize
	frame.PutHeader(s.cur, frame.Data, size)
	s.submitted += uint64(size)
	s.queue <- s.cur
	s.cur = nil
}

// discard forgets what was gathered and not sent.
func (s *sink) discard() {
	if s.cur != nil {
		s.total -= uint64(len(s.cur) - frame.HeaderSize)
		s.free <- s.cur[:0]
		s.cur = nil
	}
}

// send queues a frame behind the data.
func (s *sink) send(t frame.Type, payload any) error {
	b, err := frame.Encode(t, payload)
	if err != nil {
		return err
	}
	s.queue <- b
	return nil
}

// start begins a new statement's stream.
func (s *sink) start() { s.total, s.submitted = 0, 0 }

// close waits until everything was written.
func (s *sink) close() {
	close(s.queue)
	s.done.Wait()
}
