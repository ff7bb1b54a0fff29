// Package zmtp is as much of ZeroMQ as the kernel's end of a Jupyter connection needs,
// the ends that listen: Router (shell, stdin, control), Pub (iopub) and Echo
// (heartbeat), over TCP or unix sockets, by ZMTP 3.0 without security (Jupyter signs its
// messages itself). See https://rfc.zeromq.org/spec/23/.
//
// Bounds: a message has at most MaxMessage bytes in MaxFrames frames; a peer's outgoing
// queue holds queueBytes, and one message beyond; a sender waits for the slowest peer,
// and drops it after stallTime without progress. Unlike libzmq's nothing is dropped
// silently. Each socket has two goroutines for each peer and one more; Close ends them
// and waits.
package zmtp
