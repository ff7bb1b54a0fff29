package tunneltest

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/postern-dev/postern/tunnel"
)

// Options change what Pair and NewHost make.
type Options struct {
	Dial   tunnel.DialConfig   // URL and TLS are set if empty
	Server tunnel.ServerConfig // TLS and Handler are set if empty
	Relay  *RelayConfig        // put a Relay between the two
	Logger *slog.Logger
}

// Option changes Options.
type Option func(*Options)

// WithConfig changes the Config of both sides.
func WithConfig(f func(*tunnel.Config)) Option {
	return func(o *Options) { f(&o.Dial.Config); f(&o.Server.Config) }
}

// WithDial changes the dialer's configuration.
func WithDial(f func(*tunnel.DialConfig)) Option { return func(o *Options) { f(&o.Dial) } }

// WithServer changes the acceptor's configuration.
func WithServer(f func(*tunnel.ServerConfig)) Option { return func(o *Options) { f(&o.Server) } }

// WithRelay puts a relay between the two ends.
func WithRelay(c RelayConfig) Option { return func(o *Options) { o.Relay = &c } }

// Host is an acceptor that listens on loopback.
type Host struct {
	CA     *CA
	Server *tunnel.Server
	Relay  *Relay // nil without WithRelay
	URL    string // of the relay if there is one
	Dialed tunnel.DialConfig
	HTTP   *http.Server

	up chan *tunnel.Tunnel
}

// NewHost starts an acceptor; it ends with the test.
func NewHost(t testing.TB, opts ...Option) *Host {
	t.Helper()
	o := Options{}
	for _, f := range opts {
		f(&o)
	}
	h := &Host{CA: NewCA(), up: make(chan *tunnel.Tunnel, 64)}
	if o.Server.TLS == nil {
		o.Server.TLS = h.CA.ServerTLS()
	}
	if o.Logger != nil {
		o.Server.Logger, o.Dial.Logger = o.Logger, o.Logger
	}
	handler := o.Server.Handler
	o.Server.Handler = func(tun *tunnel.Tunnel) {
		select {
		case h.up <- tun:
		default:
		}
		if handler != nil {
			handler(tun)
		}
	}
	h.Server = tunnel.NewServer(o.Server)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("/tunnel", h.Server)
	h.HTTP = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	served := make(chan struct{})
	go func() { defer close(served); _ = h.HTTP.Serve(ln) }()
	t.Cleanup(func() {
		h.Server.Close()
		_ = h.HTTP.Close()
		<-served
	})
	addr := ln.Addr().String()
	if o.Relay != nil {
		h.Relay, err = NewRelay(addr, *o.Relay)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(h.Relay.Close)
		addr = h.Relay.Addr()
	}
	h.URL = "ws://" + addr
	h.Dialed = o.Dial
	if h.Dialed.URL == "" {
		h.Dialed.URL = h.URL
	}
	if h.Dialed.TLS == nil {
		h.Dialed.TLS = h.CA.ClientTLS("agent")
	}
	return h
}

// Dial connects a dialer to the host and returns both ends; they end with the
// test.
func (h *Host) Dial(t testing.TB) (dialer, acceptor *tunnel.Tunnel) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	d, err := tunnel.Dial(ctx, h.Dialed)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	t.Cleanup(func() { _ = d.Close(nil) })
	for {
		select {
		case a := <-h.up:
			if a.ID() != d.ID() {
				continue
			}
			t.Cleanup(func() { _ = a.Close(nil) })
			return d, a
		case <-ctx.Done():
			t.Fatal("the acceptor's tunnel did not come up")
		}
	}
}

// Accepted returns the next tunnel that came up and was not returned by Dial.
func (h *Host) Accepted() <-chan *tunnel.Tunnel { return h.up }

// Pair returns both ends of a tunnel over a real WebSocket on loopback.
func Pair(t testing.TB, opts ...Option) (dialer, acceptor *tunnel.Tunnel) {
	t.Helper()
	return NewHost(t, opts...).Dial(t)
}
