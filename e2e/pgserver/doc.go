// Package pgserver starts throwaway PostgreSQL servers for tests, figures and
// the demo.
//
// A server listens on a free loopback port and on a unix socket, both with
// scram-sha-256 passwords, keeps its data in a temporary directory without
// fsync, and runs as the user postgres when we are root, else as ourselves.
// [Launch] needs no test; [Start] ties the server to one. Any package's tests
// may import it. All methods may be called from several goroutines, except
// that Stop, Kill and Restart exclude each other.
package pgserver
