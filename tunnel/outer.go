package tunnel

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"golang.org/x/net/http/httpproxy"
)

// outer makes what is beneath the inner TLS of a lane: name, proxy, TCP, outer TLS
// and WebSocket. It knows no identity.
type outer struct {
	url         *url.URL
	tls         *tls.Config
	roots       *x509.CertPool                   // beside the system's; may be nil
	proxy       func(*url.URL) (*url.URL, error) // nil: by the environment
	header      http.Header
	stepTimeout time.Duration
}

func newOuter(u *url.URL, header http.Header, stepTimeout time.Duration) outer {
	return outer{
		url: u, header: header, stepTimeout: stepTimeout,
		tls: &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, DynamicRecordSizingDisabled: true},
	}
}

// parseURL is the URL to dial, ws or wss, without user and fragment. Its errors
// show nothing of it but the scheme.
func parseURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, errors.New("the URL cannot be parsed") // err would show userinfo
	}
	switch u.Scheme {
	case "http":
		u.Scheme = "ws"
	case "https":
		u.Scheme = "wss"
	case "ws", "wss":
	default:
		return nil, fmt.Errorf("unknown scheme %q", u.Scheme)
	}
	if u.Hostname() == "" {
		return nil, errors.New("no host")
	}
	u.User, u.Fragment = nil, ""
	if u.Path == "" || u.Path == "/" {
		u.Path = "/tunnel"
	}
	return u, nil
}

func (o *outer) target() string { return o.url.Redacted() }

func (o *outer) address() string {
	port := o.url.Port()
	if port == "" {
		port = "80"
		if o.url.Scheme == "wss" {
			port = "443"
		}
	}
	return net.JoinHostPort(o.url.Hostname(), port)
}

func (o *outer) chosenProxy() (*url.URL, error) {
	u := *o.url
	u.Scheme = "http"
	if o.url.Scheme == "wss" {
		u.Scheme = "https"
	}
	if o.proxy != nil {
		return o.proxy(&u)
	}
	return httpproxy.FromEnvironment().ProxyFunc()(&u)
}

// raise makes the WebSocket of one lane. rtt is how long its upgrade took.
func (o *outer) raise(a *attempt, class Class, id [idSize]byte, hook func(Class, net.Conn) net.Conn) (wc *wsConn, rtt time.Duration, derr *DialError) {
	conn, derr := o.connect(a)
	if derr != nil {
		return nil, 0, derr
	}
	tuneTCP(conn, class)
	if hook != nil {
		conn = hook(class, conn)
	}
	w := newWire(conn)
	a.step(w)
	a.begins(StepUpgrade, o.target())
	began := time.Now()
	ws, derr := o.upgrade(a.ctx, w, id, class)
	if derr != nil {
		return nil, 0, derr
	}
	return newWSConn(ws, w, true), time.Since(began), nil
}
