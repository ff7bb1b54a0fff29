package hub

import (
	"io"
	"net/http"
	"sync"
)

// counted is a transport that knows which requests are under way, body included.
type counted struct {
	link *Link
	next http.RoundTripper
}

// RoundTrip implements http.RoundTripper.
func (c *counted) RoundTrip(r *http.Request) (*http.Response, error) {
	c.link.begin()
	resp, err := c.next.RoundTrip(r)
	if err != nil {
		c.link.end()
		return nil, err
	}
	body := &countedBody{ReadCloser: resp.Body, end: sync.OnceFunc(c.link.end)}
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
