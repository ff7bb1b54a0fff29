// Package stack starts the real binaries for the demo, the end-to-end tests and
// the benchmarks: a control plane, agents joined to it, each a Process with its
// own log file below one temporary directory. Everything listens on loopback or
// in a network namespace of the caller's, and Close ends what was started, by
// process id, and removes the directory.
package stack
