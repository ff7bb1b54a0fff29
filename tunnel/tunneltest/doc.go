// Package tunneltest is the test kit of package tunnel: a connected pair of
// tunnels in a line (Pair), a throwaway certificate authority (CA), a TCP relay
// that paces, delays, stalls and cuts (Relay) and faults beneath the WebSocket
// (Fault). Tests, e2e and the benchmarks import it; the product does not.
//
// Everything that a function starts ends with the test that called it, or with
// the Close of what it returned.
package tunneltest
