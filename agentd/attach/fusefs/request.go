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
	c := &requestContext{Context: context.Background(), cancel: cancel, over: make(chan struct{})}
	return c, c.end
}

type requestContext struct {
	context.Context
	cancel <-chan struct{}
	over   chan struct{} // the request was answered

	mu   sync.Mutex
	done chan struct{} // nil: nobody asked
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
			go c.watch()
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

func (c *requestContext) watch() {
	select {
	case <-c.over:
		return
	case <-c.cancel: // nil: never
	}
	t := time.NewTimer(2 * time.Second)
	defer t.Stop()
	select {
	case <-t.C:
		c.finish(context.Canceled)
	case <-c.over:
	}
}

func (c *requestContext) finish(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	if c.err = err; c.done != nil {
		close(c.done)
	}
}

// end ends the context and its goroutine; call it once.
func (c *requestContext) end() {
	close(c.over)
	c.finish(context.Canceled)
}
