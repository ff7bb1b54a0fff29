package jupyter

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// attachFirst and attachMost are how long is waited between two attempts to reach a
	// host again.
	attachFirst, attachMost = 50 * time.Millisecond, time.Second
	// lastTime bounds how long a stream that ends may take for its last words.
	lastTime = time.Second
	// settled is after how long a stream counts as one that works.
	settled = 5 * time.Second
	// sendAtOnce bounds how many messages go to the host in one write.
	sendAtOnce = 32
)

// errStreamLost is returned for a stream that ended without a word.
var errStreamLost = errors.New("the kernel's stream was lost")

// relay passes messages both ways, on one stream after the other, until the WebSocket
// or the kernel ends.
func (c *conn) relay(stream Channels) error {
	wait := attachFirst
	for {
		began := time.Now()
		err := c.over(stream)
		stream.Close() //nolint:errcheck // it has ended
		if c.ctx.Err() != nil {
			return context.Cause(c.ctx)
		}
		if !passes(err) {
			return c.last(err)
		}
		c.server.cfg.Metrics.streamLost()
		c.log.Debug("kernel's stream lost: opening another", "err", err)
		if time.Since(began) > settled {
			wait = attachFirst
		}
		if stream, err = c.attach(&wait); err != nil {
			return c.last(err)
		}
	}
}

// passes reports whether an error may be gone on the next stream.
func passes(err error) bool {
	switch proto.CodeOf(err) {
	case proto.CodeNotFound, proto.CodePolicyDenied, proto.CodeRoleDenied, proto.CodeUnauthenticated, proto.CodeOrganizationDisabled,
		proto.CodeInvalid, proto.CodeVersionMismatch, proto.CodeAgentRevoked:
		return false
	}
	var write *writeError
	return !errors.As(err, &write)
}

// last tells the client that its kernel is gone, if that is why the connection ends.
func (c *conn) last(err error) error {
	if proto.CodeOf(err) == proto.CodeNotFound {
		if m, merr := jupyter.New(jupyter.IOPub, "status", "postern", map[string]string{"execution_state": "dead"}); merr == nil {
			c.write(m) //nolint:errcheck // the connection ends anyway
		}
	}
	return err
}

// attach opens another stream, as soon as the agent is there.
func (c *conn) attach(wait *time.Duration) (Channels, error) {
	for {
		select {
		case <-c.ctx.Done():
			return nil, context.Cause(c.ctx)
		case <-time.After(*wait):
		}
		*wait = min(2**wait, attachMost)
		stream, err := c.server.cfg.Kernels.Attach(c.ctx, c.caller, Attach{Kernel: c.kernel, Client: c.client, Resume: true, After: c.written.Load(), Again: true})
		if err == nil || c.ctx.Err() != nil || !passes(err) {
			return stream, err
		}
	}
}

// writeError is a WebSocket's, as opposed to a stream's.
type writeError struct{ error }

// Unwrap returns the cause.
func (e *writeError) Unwrap() error { return e.error }

// over passes messages both ways over one stream until it ends, and says why.
func (c *conn) over(stream Channels) error {
	ctx, cancel := context.WithCancel(c.ctx)
	c.mu.Lock()
	c.sent = 0 // what was not taken is sent again
	confirmed := uint64(0)
	c.mu.Unlock()
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	out := kernelstream.NewWriter(stream)
	work.Go(func() {
		c.send(ctx, out, confirmed)
		// What ends one way ends both; what the client has read is told before.
		timer := time.AfterFunc(lastTime, func() { stream.Close() }) //nolint:errcheck // it unblocks the write
		defer timer.Stop()
		c.mu.Lock()
		confirmed := c.confirmed
		c.mu.Unlock()
		if confirmed > 0 {
			out.Confirm(confirmed) //nolint:errcheck // the stream may be the one that was lost
		}
		stream.Close() //nolint:errcheck // it unblocks the reader
	})
	work.Go(func() {
		select {
		case <-ctx.Done():
		case <-stream.Retired():
			cancel()
		}
	})
	return c.receive(stream)
}

// send sends what is pending and what the client has confirmed, as that comes.
func (c *conn) send(ctx context.Context, out *kernelstream.Writer, confirmed uint64) {
	for {
		c.mu.Lock()
		var frames []*posternv1.KernelFrame
		for _, m := range c.pending[c.sent:min(len(c.pending), c.sent+sendAtOnce)] {
			frames = append(frames, &posternv1.KernelFrame{Frame: &posternv1.KernelFrame_Send{Send: m}})
		}
		c.sent += len(frames)
		if c.confirmed > confirmed {
			confirmed = c.confirmed
			frames = append(frames, &posternv1.KernelFrame{Frame: &posternv1.KernelFrame_Confirm{Confirm: confirmed}})
		}
		changed := c.changed
		c.mu.Unlock()
		if len(frames) == 0 {
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
			continue
		}
		for _, f := range frames {
			if err := out.Send(f); err != nil {
				return
			}
		}
	}
}

// took forgets what the host has: n messages of this stream in all, of which before
// were known.
func (c *conn) took(n, before uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n < before || n-before > uint64(c.sent) {
		return proto.Errorf(proto.CodeInternal, "the host took %d messages of %d", n, before+uint64(c.sent))
	}
	for range n - before {
		c.bytes -= jupyter.Size(c.pending[0])
		c.pending[0] = nil
		c.pending = c.pending[1:]
		c.sent--
	}
	if len(c.pending) == 0 {
		c.pending = nil
	}
	c.changedLocked()
	return nil
}

// receive passes on what the host sends, until the stream ends.
func (c *conn) receive(stream Channels) error {
	in := kernelstream.NewReader(stream)
	taken := uint64(0)
	for {
		f, err := in.Next()
		if err != nil {
			if errors.Is(err, kernelstream.ErrMalformed) {
				return &proto.Error{Code: proto.CodeInternal, Message: "the host's messages are not understood", Err: err}
			}
			return errStreamLost
		}
		switch f := f.Frame.(type) {
		case *posternv1.KernelFrame_Taken:
			if err := c.took(f.Taken, taken); err != nil {
				return err
			}
			taken = f.Taken
		case *posternv1.KernelFrame_Delivery:
			if err := c.deliver(f.Delivery); err != nil {
				return &writeError{err}
			}
			if err := c.follow(in.Buffered() == 0); err != nil {
				return &writeError{err}
			}
		case *posternv1.KernelFrame_End:
			if err := kernelstream.EndError(&posternv1.KernelFrame{Frame: f}); err != nil {
				return err
			}
			return io.EOF
		}
	}
}

// follow sends a ping behind the messages so far, if one is due; quiet says that no
// message is at hand.
func (c *conn) follow(quiet bool) error {
	c.mu.Lock()
	under := len(c.pings)
	c.mu.Unlock()
	if c.unpinged == 0 || !quiet && under >= pingsAtOnce && c.unpinged < pingAfter {
		return nil
	}
	return c.ping()
}

// deliver writes one message for the client, once.
func (c *conn) deliver(d *posternv1.KernelDelivery) error {
	if d.Sequence <= c.written.Load() {
		return nil // it came on an earlier stream
	}
	m := d.Message
	if d.TruncatedFrom > 0 {
		m = c.notice("output is missing here: the host's journal was full, and dropped it before it could be sent")
	}
	if m != nil {
		if m.Channel == jupyter.IOPub && len(m.ParentHeader) > 2 {
			c.lastIOPub = m.ParentHeader
		}
		if err := c.write(m); err != nil {
			return err
		}
		c.unpinged++
	}
	c.written.Store(d.Sequence)
	return nil
}
