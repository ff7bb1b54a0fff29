package api

import (
	"net/http"
	"testing"
)

func TestRemoteAddress(t *testing.T) {
	for _, tc := range []struct {
		name, peer, want string
		forwarded        []string
	}{
		{name: "a peer", peer: "192.0.2.1:999", want: "192.0.2.1"},
		{name: "a peer that lies", peer: "192.0.2.1:999", forwarded: []string{"198.51.100.7"}, want: "192.0.2.1"},
		{name: "this machine", peer: "127.0.0.1:999", want: "127.0.0.1"},
		{name: "a proxy here", peer: "127.0.0.1:999", forwarded: []string{"198.51.100.7"}, want: "198.51.100.7"},
		{name: "a proxy here, IPv6", peer: "[::1]:999", forwarded: []string{"2001:db8::1"}, want: "2001:db8::1"},
		{name: "a client that lies to the proxy", peer: "127.0.0.1:999", forwarded: []string{"203.0.113.9, 198.51.100.7"}, want: "198.51.100.7"},
		{name: "in a line of its own", peer: "127.0.0.1:999", forwarded: []string{"203.0.113.9", "198.51.100.7"}, want: "198.51.100.7"},
		{name: "nonsense", peer: "127.0.0.1:999", forwarded: []string{"unknown"}, want: "127.0.0.1"},
		{name: "no port", peer: "@", want: "@"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := &http.Request{RemoteAddr: tc.peer, Header: http.Header{}}
			for _, f := range tc.forwarded {
				r.Header.Add("X-Forwarded-For", f)
			}
			if got := RemoteAddress(r); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}
