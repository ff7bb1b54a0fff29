package tunnel

import (
	"time"
)

// GoAway is the acceptor's or dialer's notice that it will end the tunnel: open
// a new one elsewhere, then let this one's streams finish.
type GoAway struct {
	ReconnectAfter time.Duration // dial the new tunnel after this long
	Deadline       time.Duration // the sender ends the tunnel after this long; 0 means when it likes
	Reason         string        // one line for logs
}

// GoAway tells the peer to move. Streams go on; after deadline, if that is not 0,
// this side ends the tunnel with ErrDrained. A side that drains should also stop
// to open streams itself.
func (t *Tunnel) GoAway(reconnectAfter, deadline time.Duration, reason string) {
	_ = t.control.mux.send((&message{typ: msgGoAway, reconnectAfter: reconnectAfter, deadline: deadline, text: reason}).append(nil))
	if deadline <= 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil || t.sentGoAway != nil {
		return
	}
	t.sentGoAway = time.AfterFunc(deadline, func() { _ = t.Close(ErrDrained) })
}

// GoneAway delivers the peer's first go-away. The channel is never closed.
func (t *Tunnel) GoneAway() <-chan GoAway {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.goneChLocked()
}

func (t *Tunnel) goneChLocked() chan GoAway {
	if t.goneCh == nil {
		t.goneCh = make(chan GoAway, 1)
		if t.gone != nil {
			t.goneCh <- *t.gone
		}
	}
	return t.goneCh
}

func (t *Tunnel) receivedGoAway(g GoAway) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.gone != nil || t.err != nil {
		return
	}
	t.gone = &g
	if t.goneCh != nil {
		t.goneCh <- g
	}
	t.log.Debug("go-away received", "reason", g.Reason, "duration_seconds", g.ReconnectAfter.Seconds())
}
