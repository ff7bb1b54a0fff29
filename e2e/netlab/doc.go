// Package netlab builds a customer's network in network namespaces of this
// machine, for tests of what a firewall does to the tunnel:
//
//	customer (10.78.0.2) --- firewall (10.78.0.1 | 10.77.0.1) --- cloud (10.77.0.2)
//
// The firewall drops every new connection towards the customer's side. By
// Options.Egress the customer may connect out directly, only through an HTTP
// CONNECT proxy (a real tinyproxy at 10.78.0.1:3128), or not at all. Cut makes
// the link go silent, as a pulled cable or a lost route does: packets vanish,
// nobody is told.
//
// A lab belongs to one test and goes with it, after a failure too. Names hold the
// process's id, so that test processes do not meet and a later one removes what a
// killed one left behind. Needs root, iproute2, nftables and, for the proxy,
// tinyproxy; RequireRoot skips a test without root.
//
// All methods may be called from any goroutine.
package netlab
