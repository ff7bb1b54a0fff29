package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// laneRequest is a lane being dialed, by this side or, asked by this side, by
// the peer.
type laneRequest struct {
	class Class
	once  sync.Once
	done  chan struct{}
	lane  *lane
	solo  *soloStream
	err   error
}

func newLaneRequest(class Class) *laneRequest {
	return &laneRequest{class: class, done: make(chan struct{})}
}

// finish is called once with the outcome; it returns false if it was before.
func (r *laneRequest) finish(l *lane, err error) bool {
	first := false
	r.once.Do(func() {
		first = true
		r.lane, r.err = l, err
		if l != nil && l.class == Solo {
			r.solo = newSoloStream(l)
		}
		close(r.done)
	})
	return first
}

// bulkLane returns the bulk lane, dialing it if need be. Concurrent callers share
// one dial.
func (t *Tunnel) bulkLane(ctx context.Context) (*lane, error) {
	t.mu.Lock()
	if t.err != nil {
		t.mu.Unlock()
		return nil, t.closedError()
	}
	if l := t.bulk; l != nil && l.alive() && l.mayOpen() {
		t.mu.Unlock()
		return l, nil
	}
	r := t.bulkWait
	if r == nil {
		r = newLaneRequest(Bulk)
		t.bulkWait = r
		t.mu.Unlock()
		t.startLane(r)
	} else {
		t.mu.Unlock()
	}
	select {
	case <-r.done:
		return r.lane, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-t.done:
		return nil, t.closedError()
	}
}

// openSolo returns a stream on a lane of its own.
func (t *Tunnel) openSolo(ctx context.Context) (net.Conn, error) {
	t.mu.Lock()
	if t.err != nil {
		t.mu.Unlock()
		return nil, t.closedError()
	}
	if t.soloCount >= t.cfg.MaxSolo {
		t.mu.Unlock()
		return nil, errNoSolo
	}
	t.soloCount++ // given back by laneEnded or below
	t.mu.Unlock()
	r := newLaneRequest(Solo)
	t.startLane(r)
	select {
	case <-r.done:
	case <-ctx.Done():
		r.finish(nil, context.Cause(ctx)) // a lane that comes later is closed
	case <-t.done:
		r.finish(nil, t.closedError())
	}
	<-r.done
	if r.err != nil {
		t.mu.Lock()
		t.soloCount--
		t.mu.Unlock()
		return nil, r.err
	}
	t.metrics.streamOpened(Solo, false)
	return r.solo, nil
}

var errNoSolo = errors.New("limit of solo lanes reached")

// startLane gets a lane for r: by dialing on the dialer, by asking the dialer
// otherwise. It does not wait.
func (t *Tunnel) startLane(r *laneRequest) {
	if t.isDialer {
		opener := uint8(openerDialer)
		if !t.spawn(func() { t.dialLane(r, opener, 0) }) {
			t.finishLane(r, nil, t.closedError())
		}
		return
	}
	t.mu.Lock()
	if t.err != nil {
		t.mu.Unlock()
		t.finishLane(r, nil, t.closedError())
		return
	}
	t.nextToken++
	if t.nextToken == 0 {
		t.nextToken++
	}
	token := t.nextToken
	if t.requests == nil {
		t.requests = make(map[uint32]*laneRequest)
	}
	t.requests[token] = r
	t.mu.Unlock()
	timer := time.AfterFunc(t.cfg.LaneTimeout+time.Second, func() {
		t.requestFailed(token, fmt.Errorf("no %s lane came within %v", r.class, t.cfg.LaneTimeout))
	})
	t.spawn(func() {
		<-r.done
		timer.Stop()
		t.takeRequest(token)
	})
	if err := t.control.send(&message{typ: msgOpenLane, token: token, class: r.class}); err != nil {
		t.requestFailed(token, err)
	}
}

// finishLane ends the wait for r.
func (t *Tunnel) finishLane(r *laneRequest, l *lane, err error) bool {
	t.mu.Lock()
	if t.bulkWait == r {
		t.bulkWait = nil
	}
	if l != nil && l.class == Bulk {
		t.bulk = l
	}
	t.mu.Unlock()
	return r.finish(l, err)
}

func (t *Tunnel) takeRequest(token uint32) *laneRequest {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.requests[token]
	delete(t.requests, token)
	return r
}

func (t *Tunnel) requestFailed(token uint32, err error) {
	if r := t.takeRequest(token); r != nil {
		t.finishLane(r, nil, err)
	}
}

// maxDialing bounds the lanes that the peer may have us dial at the same time.
const maxDialing = 8

// dialRequested runs on the dialer when the acceptor wants a lane.
func (t *Tunnel) dialRequested(token uint32, class Class) {
	refuse := func(text string) {
		_ = t.control.mux.send((&message{typ: msgLaneFailed, token: token, code: uint8(RefusedLimit), text: text}).append(nil))
	}
	t.mu.Lock()
	if class == Solo {
		if t.soloCount >= t.cfg.MaxSolo {
			t.mu.Unlock()
			refuse("limit of solo lanes reached")
			return
		}
		t.soloCount++
	}
	t.mu.Unlock()
	back := func() {
		if class == Solo {
			t.mu.Lock()
			t.soloCount--
			t.mu.Unlock()
		}
	}
	if t.dialer.dialing.Add(1) > maxDialing {
		t.dialer.dialing.Add(-1)
		back()
		refuse("too many lanes being dialed")
		return
	}
	ok := t.spawn(func() {
		defer t.dialer.dialing.Add(-1)
		r := newLaneRequest(class)
		t.dialLane(r, openerAcceptor, token)
		if <-r.done; r.err != nil {
			back()
			var refused *Refusal
			text := "dialing the lane failed"
			if errors.As(r.err, &refused) {
				text = refused.Text
			} else if step := FailedStep(r.err); step != "" {
				text = "dialing the lane failed: " + string(step)
			}
			refuse(text)
			return
		}
		if r.solo != nil {
			t.metrics.streamOpened(Solo, true)
			t.accepted.push(r.solo)
		}
	})
	if !ok {
		t.dialer.dialing.Add(-1)
		back()
	}
}

// dialLane dials a lane for r and takes it into the tunnel.
func (t *Tunnel) dialLane(r *laneRequest, opener uint8, token uint32) {
	ctx, cancel := context.WithTimeout(t.dialer.ctx, t.cfg.LaneTimeout)
	defer cancel()
	l, err := t.dialer.lane(ctx, t, r.class, opener, token)
	if err == nil && r.class == Bulk {
		if !t.addLane(l) {
			l.fail(t.closedError())
			err = t.closedError()
		} else if err = l.startMux(); err != nil {
			t.laneEnded(l)
		}
	} else if err == nil && !t.addLane(l) {
		l.fail(t.closedError())
		err = t.closedError()
	}
	if err != nil {
		t.log.Debug("lane failed", "lane", r.class.String(), "err", err)
		t.finishLane(r, nil, err)
		return
	}
	if !t.finishLane(r, l, nil) && r.class == Solo {
		// Nobody waits any more, and openSolo or dialRequested gave the count back.
		t.mu.Lock()
		t.soloCount++
		t.mu.Unlock()
		l.endSolo(ErrClosed)
	}
}

// joined takes a lane that the peer dialed into the tunnel; it runs on the
// acceptor. reserveSolo was called before for a solo lane.
func (t *Tunnel) joined(l *lane, opener uint8, token uint32) error {
	if !t.addLane(l) {
		return t.closedError()
	}
	if l.class == Bulk {
		if err := l.startMux(); err != nil {
			t.laneEnded(l)
			return err
		}
		r := t.takeRequest(token)
		if r != nil && r.class == Bulk {
			t.finishLane(r, l, nil)
			return nil
		}
		t.mu.Lock()
		if t.bulk == nil || !t.bulk.alive() {
			t.bulk = l
		}
		r = t.bulkWait
		t.mu.Unlock()
		if r != nil { // the dialer was faster with one of its own
			t.finishLane(r, l, nil)
		}
		return nil
	}
	if opener == openerDialer {
		t.metrics.streamOpened(Solo, true)
		t.accepted.push(newSoloStream(l))
		return nil
	}
	if r := t.takeRequest(token); r != nil && r.class == Solo && t.finishLane(r, l, nil) {
		return nil
	}
	t.mu.Lock()
	t.soloCount++ // openSolo gave it back; laneEnded will again
	t.mu.Unlock()
	l.endSolo(ErrClosed) // asked for, but nobody waits any more
	return nil
}

// reserveSolo counts a solo lane that the peer dialed, unless it answers a
// request of ours, which openSolo counted.
func (t *Tunnel) reserveSolo(opener uint8, token uint32) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if opener == openerAcceptor {
		r := t.requests[token]
		return r != nil && r.class == Solo
	}
	if t.soloCount >= max(t.cfg.MaxSolo, 0) {
		return false
	}
	t.soloCount++
	return true
}
