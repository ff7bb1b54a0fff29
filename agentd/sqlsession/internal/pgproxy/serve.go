package pgproxy

import (
	"fmt"
	"time"

	"github.com/postern-dev/postern/proto"
)

// serve answers the client's messages one by one.
func (p *Proxy) serve() error {
	var head [5]byte
	for {
		select {
		case <-p.drain:
			return fail{&Refusal{SQLState: stateShutdown, Message: "terminating connection: the data source's policy changed, or the agent stops", Code: proto.CodeUnavailable}}
		default:
		}
		if err := p.take(head[:], true); err != nil {
			return err
		}
		t, size := head[0], int(int32(uint32(head[1])<<24|uint32(head[2])<<16|uint32(head[3])<<8|uint32(head[4])))-4
		if size < 0 {
			return protocolError("a message of type %q has an impossible length", t)
		}
		if err := p.dispatch(t, size); err != nil {
			return err
		}
		if p.out.err != nil {
			return errEnded
		}
	}
}

func protocolError(format string, args ...any) error {
	return fail{&Refusal{SQLState: stateProtocol, Message: "protocol violation: " + fmt.Sprintf(format, args...), Code: proto.CodeInvalid}}
}

// take fills b with what the client sends next. idle tells that a new message may
// begin here.
func (p *Proxy) take(b []byte, idle bool) error {
	for first := true; len(b) > 0; first = false {
		n, err := p.in.take(b)
		if err != nil {
			return errEnded
		}
		b = b[n:]
		if p.taken += n; p.taken >= creditStep {
			p.out.credit(p.taken)
			p.taken = 0
		}
		if len(b) > 0 && n == 0 {
			if err := p.await(idle && first); err != nil {
				return err
			}
		}
	}
	return nil
}

// takeBody holds a message's body in p.body, until the next message.
func (p *Proxy) takeBody(t byte, size int) error {
	if size > maxBody {
		return protocolError("a message of type %q has %d bytes, more than %d", t, size, maxBody)
	}
	if cap(p.body) < size {
		p.body = make([]byte, size, max(size, 1<<10))
	} else if cap(p.body) > 64<<10 && size <= 64<<10 {
		p.body = make([]byte, size, 64<<10)
	}
	p.body = p.body[:size]
	return p.take(p.body, false)
}

// await waits for the client's next bytes, and looks after an idle server
// meanwhile.
func (p *Proxy) await(boundary bool) error {
	p.out.flush()
	limit, state, what := p.config.Idle, stateIdle, "idle-session timeout"
	if p.tx != 'I' || p.open {
		limit, state, what = p.config.IdleInTransaction, stateIdleInTx, "idle-in-transaction timeout"
	}
	if p.copying {
		wait := time.NewTimer(limit)
		defer wait.Stop()
		select {
		case <-p.in.wake:
			return nil
		case <-wait.C:
			return fail{&Refusal{SQLState: state, Message: fmt.Sprintf("terminating connection: nothing came for a COPY for %s", limit), Code: proto.CodeTimeout}}
		}
	}
	wait := time.NewTimer(watchAfter)
	defer wait.Stop()
	select {
	case <-p.in.wake:
		return nil
	case <-p.drain:
		return p.drained(boundary)
	case <-wait.C:
	}
	watch := p.watch()
	wait.Reset(max(limit-watchAfter, time.Millisecond))
	for {
		select {
		case <-p.in.wake:
			return p.unwatch(watch)
		case <-p.drain:
			_ = p.unwatch(watch)
			return p.drained(boundary)
		case err := <-watch:
			if err == nil {
				err = p.asides()
			}
			if err != nil {
				return err
			}
			p.out.flush()
			watch = p.watch()
		case <-wait.C:
			_ = p.unwatch(watch)
			return fail{&Refusal{SQLState: state, Message: fmt.Sprintf("terminating connection due to %s: nothing came for %s", what, limit), Code: proto.CodeTimeout}}
		}
	}
}

func (p *Proxy) drained(boundary bool) error {
	if boundary {
		return nil // serve says it
	}
	return fail{&Refusal{SQLState: stateShutdown, Message: "terminating connection: the data source's policy changed, or the agent stops", Code: proto.CodeUnavailable}}
}
