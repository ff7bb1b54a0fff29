package fusefs

import (
	"context"
	"sync"
	"time"
)

// request returns a context that ends when the kernel takes the request back. A signal that
// does not kill the caller does so, too, so it gets two seconds to go on. done ends it.
//
// Most requests are answered from memory and never wait: only one that asks for Done costs a
// goroutine.
func request(cancel <-chan struct{}) (ctx context.Context, done func()) {
	c := &requestContext{Context: context.Background(), cancel: cancel}
	return c, c.end
}

type requestContext struct {
	context.Context
	cancel <-chan struct{}

	mu   sync.Mutex
	done chan struct{} // nil: nobody asked
	over chan struct{} // closed when the request was answered; nil with done
	err  error
}

// Done implements context.Context.
func (c *requestContext) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done == nil {
		c.done = make(chan struct{})
		if c.err != nil {
			close(c.done)
		} else {
			c.over = make(chan struct{})
			go c.watch(c.over)
		}
	}
	return c.done
}

// Err implements context.Context.
func (c *requestContext) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *requestContext) watch(over <-chan struct{}) {
	select {
	case <-over:
		return
	case <-c.cancel: // nil: never
	}
	t := time.NewTimer(2 * time.Second)
	defer t.Stop()
	select {
	case <-t.C:
		c.finish(context.Canceled)
	case <-over:
	}
}

func (c *requestContext) finish(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.finishLocked(err)
}

func (c *requestContext) finishLocked(err error) {
	if c.err != nil {
		return
	}
	if c.err = err; c.done != nil {
		close(c.done)
	}
}

// end ends the context and its goroutine; call it once.
func (c *requestContext) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over != nil {
		close(c.over)
	}
	c.finishLocked(context.Canceled)
}
