package hub

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/postern-dev/postern/tunnel"
)

// counted is a transport that knows which requests are under way, body included. A
// request that finds its tunnel gone before a byte of it was sent follows the agent to its new one.
type counted struct {
	link  *Link
	class tunnel.Class
}

const (
	// moves bounds how often a request follows its agent; moveWait is the first pause
	// between two tries, which double.
	moves    = 5
	moveWait = 40 * time.Millisecond
)

// errMoved is returned when a tunnel is not there any more and nothing was sent on it.
var errMoved = errors.New("the tunnel has made way for another one")

// RoundTrip implements http.RoundTripper.
func (c *counted) RoundTrip(r *http.Request) (*http.Response, error) {
	l := c.link
	for try := 0; ; try++ {
		transport, err := l.enter(r.Context(), c.class)
		if err == nil {
			return l.send(transport, r)
		}
		if !errors.Is(err, errMoved) || try == moves {
			return nil, err
		}
		select {
		case <-time.After(moveWait << try):
		case <-r.Context().Done():
			return nil, context.Cause(r.Context())
		}
		if l, err = l.hub.Agent(l.Agent); err != nil {
			return nil, err
		}
	}
}

// enter begins a request; send follows, or the error is errMoved or final.
func (l *Link) enter(ctx context.Context, class tunnel.Class) (http.RoundTripper, error) {
	if !l.begin() {
		return nil, errMoved
	}
	if l.peer != nil {
		return l.peer.tunnel.Transport(class), nil
	}
	conn, err := l.dial(ctx, class)
	if err != nil {
		l.end()
		return nil, err
	}
	used := false
	return &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			if used {
				return nil, errMoved
			}
			used = true
			return conn, nil
		},
		// A stream is for one request: the tunnel must be able to end when none is under way.
		DisableKeepAlives: true, DisableCompression: true, ExpectContinueTimeout: time.Second,
	}, nil
}

// send runs a request that enter began.
func (l *Link) send(transport http.RoundTripper, r *http.Request) (*http.Response, error) {
	resp, err := transport.RoundTrip(r)
	if err != nil {
		l.end()
		return nil, err
	}
	body := &countedBody{ReadCloser: resp.Body, end: sync.OnceFunc(l.end)}
	resp.Body = body
	if w, ok := body.ReadCloser.(io.Writer); ok { // an upgraded connection
		resp.Body = countedConn{body, w}
	}
	return resp, nil
}

// countedConn is the body of a response that upgrades the connection.
type countedConn struct {
	*countedBody
	io.Writer
}

type countedBody struct {
	io.ReadCloser
	end func()
}

// Close ends the request.
func (b *countedBody) Close() error {
	err := b.ReadCloser.Close()
	b.end()
	return err
}
