// Package zmtp is the connecting side of ZMTP 3.0, the protocol under ZeroMQ, as
// far as a Jupyter kernel's five sockets need it: DEALER, SUB and REQ, without
// security (mechanism NULL), on a connection that the caller made.
//
// It is our own because of what a kernel's shim needs and a general library does
// not promise: the socket is made by the caller (in the kernel's network
// namespace), nothing reconnects or queues behind the caller's back, a closed
// connection is closed when Close returns (a checkpoint follows), memory is one
// message, and a message over the limit is passed over rather than kept.
//
// A Conn starts no goroutine. One goroutine may receive while others send; Close
// may be called by any and ends both. The peer is not trusted: a kernel runs its
// user's code.
//
// Specification: https://rfc.zeromq.org/spec/23/
package zmtp
