package tunnel

import (
	"os"
	"sync"
	"time"
)

// Blocks hold received bytes until they are read. Both sizes are pooled; a stream
// without unread bytes holds none.
const (
	smallBlock = 4 << 10  // on control lanes
	largeBlock = 32 << 10 // on bulk lanes
)

type block struct {
	next *block
	r, n int // data[r:n] is unread
	data []byte
}

var (
	smallBlocks = sync.Pool{New: func() any { return &block{data: make([]byte, smallBlock)} }}
	largeBlocks = sync.Pool{New: func() any { return &block{data: make([]byte, largeBlock)} }}
)

func getBlock(class Class) *block {
	pool := &largeBlocks
	if class == Control {
		pool = &smallBlocks
	}
	b := pool.Get().(*block)
	b.next, b.r, b.n = nil, 0, 0
	return b
}

func putBlock(b *block) {
	if len(b.data) == smallBlock {
		smallBlocks.Put(b)
	} else {
		largeBlocks.Put(b)
	}
}

// inbox is what a stream has received and nobody has read. Only the lane's
// receive loop adds to it; it never waits for a reader, and a reader never waits
// for a frame that is still arriving.
type inbox struct {
	class Class
	wake  chan struct{} // capacity 1: something changed for a reader

	mu         sync.Mutex
	head, tail *block
	unread     int
	end        error // after the unread bytes
	filling    bool  // the receive loop is writing to tail
	gone       bool  // the reader is gone: what comes is dropped
	deadline   time.Time
}

// space returns where the receive loop may put up to n bytes without holding a
// lock; commit makes them readable.
func (q *inbox) space(n int) []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.tail == nil || q.tail.n == len(q.tail.data) {
		b := getBlock(q.class)
		if q.tail == nil {
			q.head = b
		} else {
			q.tail.next = b
		}
		q.tail = b
	}
	t := q.tail
	q.filling = true
	return t.data[t.n:min(t.n+n, len(t.data))]
}

func (q *inbox) commit(n int) {
	q.mu.Lock()
	q.filling = false
	q.tail.n += n
	first := q.unread == 0 && n > 0
	q.unread += n
	if q.gone || q.unread == 0 {
		q.freeLocked()
	}
	q.mu.Unlock()
	if first {
		q.poke()
	}
}

// put copies p into the inbox.
func (q *inbox) put(p []byte) {
	for len(p) > 0 {
		n := copy(q.space(len(p)), p)
		q.commit(n)
		p = p[n:]
	}
}

// finish sets what a reader gets after the last byte; the first call counts, but
// for the stream's own Close, which drops what is unread (drain is false), as a
// reset does.
func (q *inbox) finish(err error, drain bool) {
	q.mu.Lock()
	if q.end == nil || !drain {
		q.end = err
	}
	if !drain && !q.gone {
		q.gone, q.unread = true, 0
		if !q.filling { // else commit frees
			q.freeLocked()
		}
	}
	q.mu.Unlock()
	q.poke()
}

func (q *inbox) freeLocked() {
	for b := q.head; b != nil; {
		next := b.next
		putBlock(b)
		b = next
	}
	q.head, q.tail, q.unread = nil, nil, 0
}

func (q *inbox) poke() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// read waits for bytes. One reader at a time.
func (q *inbox) read(p []byte) (int, error) {
	for {
		q.mu.Lock()
		if q.unread > 0 && !q.gone {
			n := 0
			for n < len(p) && q.unread > 0 {
				b := q.head
				m := copy(p[n:], b.data[b.r:b.n])
				b.r += m
				n += m
				q.unread -= m
				if b.r < b.n || b == q.tail {
					break
				}
				q.head = b.next
				putBlock(b)
			}
			if q.unread == 0 && !q.filling {
				q.freeLocked()
			}
			q.mu.Unlock()
			return n, nil
		}
		end, deadline := q.end, q.deadline
		q.mu.Unlock()
		if end != nil {
			return 0, end
		}
		if len(p) == 0 {
			return 0, nil
		}
		if deadline.IsZero() {
			<-q.wake
			continue
		}
		left := time.Until(deadline)
		if left <= 0 {
			return 0, os.ErrDeadlineExceeded
		}
		timer := time.NewTimer(left)
		select {
		case <-q.wake:
			timer.Stop()
		case <-timer.C:
		}
	}
}

func (q *inbox) setDeadline(t time.Time) {
	q.mu.Lock()
	q.deadline = t
	q.mu.Unlock()
	q.poke()
}
