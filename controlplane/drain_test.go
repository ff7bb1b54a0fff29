package main

import (
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"
)

// TestStopAcceptingDropsNobody connects while nobody accepts, and wants all to be served
// that were connected before listening ended.
func TestStopAcceptingDropsNobody(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := newDrainingListener(inner)
	var clients []net.Conn
	for range 20 {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		clients = append(clients, conn)
	}
	l.StopAccepting()
	if conn, err := net.Dial("tcp", l.Addr().String()); err == nil {
		conn.Close()
		t.Error("it still listens")
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "served") }), ReadHeaderTimeout: time.Minute}
	done := make(chan error)
	go func() { done <- server.Serve(l) }()
	var work sync.WaitGroup
	for i, conn := range clients {
		work.Go(func() {
			got, err := io.ReadAll(conn)
			if err != nil || len(got) < 6 || string(got[len(got)-6:]) != "served" {
				t.Errorf("connection %d: got %q, %v", i, got, err)
			}
		})
	}
	work.Wait()
	select {
	case err := <-done:
		t.Fatalf("it ended by itself: %v", err)
	default:
	}
	if err := server.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; err != http.ErrServerClosed { //nolint:errorlint // it is that very one
		t.Errorf("got %v", err)
	}
}

// TestStopAcceptingWhileAccepting stops a listener that a server waits on.
func TestStopAcceptingWhileAccepting(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := newDrainingListener(inner)
	server := &http.Server{Handler: http.NotFoundHandler(), ReadHeaderTimeout: time.Minute}
	done := make(chan error)
	go func() { done <- server.Serve(l) }()
	resp, err := http.Get("http://" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	l.StopAccepting()
	if err := server.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-done; err != http.ErrServerClosed { //nolint:errorlint // likewise
		t.Errorf("got %v", err)
	}
}

func TestPeerOptions(t *testing.T) {
	good := Options{Data: "d", LogLevel: "info", LogFormat: "text", Database: "postgres://p@h/d", Blob: "/srv/blob"}
	for _, tt := range []struct {
		name, listen, advertise string
		change                  func(*Options)
		ok                      bool
	}{
		{name: "none", ok: true},
		{name: "an address", listen: "10.0.0.5:9443", ok: true},
		{name: "a name", listen: "0.0.0.0:9443", advertise: "https://cp-0.cp:9443", ok: true},
		{name: "advertise alone", advertise: "https://cp-0.cp:9443"},
		{name: "any address", listen: "0.0.0.0:9443"},
		{name: "any address, short", listen: ":9443"},
		{name: "any port", listen: "10.0.0.5:0"},
		{name: "no port", listen: "10.0.0.5"},
		{name: "http", listen: "10.0.0.5:9443", advertise: "http://10.0.0.5:9443"},
		{name: "a path", listen: "10.0.0.5:9443", advertise: "https://10.0.0.5:9443/x"},
		{name: "no port in the URL", listen: "10.0.0.5:9443", advertise: "https://10.0.0.5"},
		{name: "a password", listen: "10.0.0.5:9443", advertise: "https://u:p@10.0.0.5:9443"},
		{name: "SQLite", listen: "10.0.0.5:9443", change: func(o *Options) { o.Database = "" }},
		{name: "no blob", listen: "10.0.0.5:9443", change: func(o *Options) { o.Blob = "" }},
		{name: "negative delay", change: func(o *Options) { o.DrainDelay = -1 }},
	} {
		o := good
		o.PeerListen, o.PeerAdvertise = tt.listen, tt.advertise
		if tt.change != nil {
			tt.change(&o)
		}
		if err := o.Validate(); (err == nil) != tt.ok {
			t.Errorf("%s: got %v", tt.name, err)
		}
	}
}
