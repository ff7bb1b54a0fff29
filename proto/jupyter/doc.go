// Package jupyter writes and reads messages of Jupyter's messaging protocol
// (version 5.x) in each form that they travel in:
//
//	ZeroMQ      identities..., "<IDS|MSG>", HMAC, header, parent header, metadata, content, buffers...
//	legacy      WebSocket: a text of JSON; with buffers a binary message of offsets, JSON and buffers
//	v1          WebSocket, subprotocol v1.kernel.websocket.jupyter.org: offsets, channel, the parts as sent
//
// A message is a posternv1.KernelMessage: its four dicts stay the JSON texts that
// the sender wrote, so that what passes through is neither re-encoded nor looked
// into. Only the header is understood, see Header.
//
// The package is pure: no I/O, no goroutines, no state but a Signer's key. Its
// functions may be called at once by several goroutines. Decoders take bytes of a
// peer: what they return may share memory with their argument, and nothing they
// allocate grows by more than what they were given. Anyone may import this package.
package jupyter
