// Package runsock makes unix sockets in a kernel's run directory, which the kernel may
// write: what it puts in a socket's place is neither followed nor changed, and who
// connects is known by user id.
//
// It starts no goroutines; a listener belongs to its caller.
package runsock
