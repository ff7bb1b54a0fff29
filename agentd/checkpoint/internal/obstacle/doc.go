// Package obstacle is the dry check: before any dump it names each open file, socket,
// device and process of a kernel that stands in CRIU's way, and what to do about it.
//
// It reads /proc and the kernel's socket tables, and never waits for the kernel: no
// command line is read, no file that a kernel has open is touched (one on a FUSE mount
// that does not answer would hang whoever touches it), links are read, not followed.
//
// What it can't see is left to CRIU, which refuses it by itself without harm.
//
// Only agentd/checkpoint imports it. Functions may be called from any goroutine.
package obstacle
