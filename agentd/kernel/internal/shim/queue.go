package shim

import (
	"context"
	"slices"
	"sync"

	"github.com/postern-dev/postern/agentd/kernel/internal/zmtp"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxQueued bounds the messages that wait for a channel of the kernel, and
	// maxQueuedBytes what they hold, in bytes; one message always fits.
	maxQueued      = 1024
	maxQueuedBytes = 64 << 20
)

// queue holds messages for one channel of the kernel until it is open.
type queue struct {
	mu     sync.Mutex
	cond   *sync.Cond
	items  []*posternv1.KernelMessage
	bytes  int
	conn   *zmtp.Conn // nil while messages wait
	closed bool
}

func newQueue() *queue {
	q := &queue{}
	q.cond = sync.NewCond(&q.mu)
	return q
}

// put adds a message; it waits for room.
func (q *queue) put(ctx context.Context, m *posternv1.KernelMessage) error {
	stop := context.AfterFunc(ctx, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.cond.Broadcast()
	})
	defer stop()
	size := jupyter.Size(m)
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.items) > 0 && (len(q.items) >= maxQueued || q.bytes+size > maxQueuedBytes) && ctx.Err() == nil && !q.closed {
		q.cond.Wait()
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if q.closed {
		return errStopped
	}
	q.items = append(q.items, m)
	q.bytes += size
	q.cond.Broadcast()
	return nil
}

// take waits for a message and a connection to send it on. The message stays first
// until done; false: the queue was closed.
func (q *queue) take() (*posternv1.KernelMessage, *zmtp.Conn, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for (len(q.items) == 0 || q.conn == nil) && !q.closed {
		q.cond.Wait()
	}
	if q.closed {
		return nil, nil, false
	}
	return q.items[0], q.conn, true
}

// done takes a message out that take gave. On conn nothing more can be sent if it failed.
func (q *queue) done(m *posternv1.KernelMessage, conn *zmtp.Conn, failed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if failed {
		if q.conn == conn {
			q.conn = nil
		}
		return
	}
	if len(q.items) == 0 || q.items[0] != m {
		return // cleared meanwhile: what is first now was not sent
	}
	q.bytes -= jupyter.Size(q.items[0])
	q.items[0] = nil
	q.items = q.items[1:]
	q.cond.Broadcast()
}

// remove takes a message out wherever it stands, if it is there.
func (q *queue) remove(m *posternv1.KernelMessage) {
	q.mu.Lock()
	defer q.mu.Unlock()
	i := slices.Index(q.items, m)
	if i < 0 {
		return
	}
	q.items = slices.Delete(q.items, i, i+1)
	q.bytes -= jupyter.Size(m)
	q.cond.Broadcast()
}

// open lets messages go to conn; nil makes them wait.
func (q *queue) open(conn *zmtp.Conn) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.conn = conn
	q.cond.Broadcast()
}

// all is what waits.
func (q *queue) all() []*posternv1.KernelMessage {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.items)
}

// add adds a message whatever waits already.
func (q *queue) add(m *posternv1.KernelMessage) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.items = append(q.items, m)
	q.bytes += jupyter.Size(m)
	q.cond.Broadcast()
}

// drop takes out what is of no use any more.
func (q *queue) drop(useless func(*posternv1.KernelMessage) bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.items = slices.DeleteFunc(q.items, func(m *posternv1.KernelMessage) bool {
		if !useless(m) {
			return false
		}
		q.bytes -= jupyter.Size(m)
		return true
	})
	q.cond.Broadcast()
}

func (q *queue) len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.items)
}

func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.cond.Broadcast()
}
