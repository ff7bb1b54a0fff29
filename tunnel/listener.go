package tunnel

import (
	"context"
	"net"
	"net/http"
	"sync"
	"time"
)

// acceptQueue holds the streams that the peer opened until they are accepted. It
// grows on demand and is bounded by Config.MaxStreams.
type acceptQueue struct {
	t      *Tunnel
	mu     sync.Mutex
	queue  []net.Conn
	wake   chan struct{} // capacity 1; made by the first Accept
	closed bool          // by the listener's Close: further streams are closed
}

func (q *acceptQueue) push(c net.Conn) {
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		_ = c.Close()
		return
	}
	q.queue = append(q.queue, c)
	wake := q.wake
	q.mu.Unlock()
	if wake != nil {
		select {
		case wake <- struct{}{}:
		default:
		}
	}
}

func (q *acceptQueue) pop() (c net.Conn, closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return nil, true
	}
	if len(q.queue) == 0 {
		q.queue = nil
		return nil, false
	}
	c = q.queue[0]
	q.queue[0] = nil
	q.queue = q.queue[1:]
	return c, false
}

func (q *acceptQueue) ready() chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.wake == nil {
		q.wake = make(chan struct{}, 1)
		if len(q.queue) > 0 || q.closed {
			q.wake <- struct{}{}
		}
	}
	return q.wake
}

// end closes what nobody accepted.
func (q *acceptQueue) end() {
	q.mu.Lock()
	queue := q.queue
	q.queue = nil
	q.closed = true
	wake := q.wake
	q.mu.Unlock()
	for _, c := range queue {
		_ = c.Close()
	}
	if wake != nil {
		select {
		case wake <- struct{}{}:
		default:
		}
	}
}

// listener is the net.Listener of a tunnel.
type listener struct{ t *Tunnel }

// Listener returns the listener that accepts the streams opened by the peer, of
// every class; each is a Classed. There is one per tunnel. Its Accept fails with
// the tunnel's cause when the tunnel has ended, with net.ErrClosed after Close,
// which refuses further streams and leaves those accepted alone.
func (t *Tunnel) Listener() net.Listener { return listener{t} }

func (l listener) Accept() (net.Conn, error) {
	q := &l.t.accepted
	wake := q.ready()
	for {
		c, closed := q.pop()
		switch {
		case c != nil:
			return c, nil
		case closed:
			select { // wake the next
			case wake <- struct{}{}:
			default:
			}
			if err := l.t.Err(); err != nil {
				return nil, &net.OpError{Op: "accept", Net: "tunnel", Err: err}
			}
			return nil, &net.OpError{Op: "accept", Net: "tunnel", Err: net.ErrClosed}
		}
		<-wake
	}
}

func (l listener) Close() error   { l.t.accepted.end(); return nil }
func (l listener) Addr() net.Addr { return l.t.LocalAddr() }

// Limits of the shared transports.
const (
	transportIdle     = 90 * time.Second
	transportMaxIdle  = 32
	transportSoloIdle = 2
)

// Transport returns the tunnel's HTTP/1.1 transport for a class: its connections
// are streams, whatever the request's host. It keeps idle streams for 90 s, at
// most 32, and for Solo 2, since each is a lane. It must not be changed; idle
// streams are closed with the tunnel.
func (t *Tunnel) Transport(class Class) *http.Transport {
	class = min(class, Solo)
	t.mu.Lock()
	defer t.mu.Unlock()
	if tr := t.transports[class]; tr != nil {
		return tr
	}
	idle := transportMaxIdle
	if class == Solo {
		idle = transportSoloIdle
	}
	tr := &http.Transport{
		DialContext:           func(ctx context.Context, _, _ string) (net.Conn, error) { return t.Open(ctx, class) },
		MaxIdleConns:          idle,
		MaxIdleConnsPerHost:   idle,
		IdleConnTimeout:       transportIdle,
		ExpectContinueTimeout: time.Second,
		DisableCompression:    true,
	}
	t.transports[class] = tr
	if t.err != nil {
		tr.DisableKeepAlives = true
	}
	return tr
}
