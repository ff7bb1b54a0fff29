// Package convoy is what one host sends another when a kernel moves: sealed so that what
// lies between them, the control plane too, sees lengths alone.
//
// From the sender:
//
//	hello     length (4 bytes), MoveParty: the sender's certificate, public key, signature
//	frames    length (4 bytes, the highest bit on the last one), AES-256-GCM
//
// From the receiver, after the hello: frames as above, without a last one, each an answer;
// the first is the greeting, which the receiver chooses.
//
// The keys, one for each direction, are derived (HKDF-SHA256) from the X25519 secret of two keys made for this move,
// each signed by its host's certificate key over the move, the kernel and both hosts; so
// neither side can be exchanged without the authority that signs certificates. Frames are
// numbered in their nonces, and their headers are authenticated: what is cut, exchanged
// or repeated is refused, and so is a stream without its last frame.
//
// Inside are parts, one behind the other:
//
//	'F' name, size (uvarint), bytes     a file: journal, waiting messages
//	'C' blocks (uvarint, bytes), 0      a checkpoint, as package pagestore exports it
//	'H' the same                        an older one
//	'E'                                 the end
//
// Memory: two frames of 64 KiB on each side. A Writer and a Reader are for one goroutine.
// Only agentd/checkpoint imports it.
package convoy
