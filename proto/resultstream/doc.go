// Package resultstream carries a result and how it ended in one HTTP body, for
// the way between the control plane and its clients. Bare Arrow with the outcome
// in a trailer is not enough there: reverse proxies drop trailers (nginx before
// 1.27 always), and end a response that is silent for a minute, which a statement
// may well be. A client asks for it with "Accept: application/vnd.postern.result".
//
// The body is a sequence of frames, each with a head of four bytes: its kind and
// the length of its payload (24 bits, big-endian).
//
//	'Q'  the query's id, when the header Postern-Query-Id could not have it any more
//	'D'  the next bytes of the rows (an Arrow IPC stream)
//	'K'  no payload: a sign of life while the statement is silent
//	'O'  the outcome, as in the trailer Postern-Outcome; nothing follows
//
// A body without an outcome is incomplete, however cleanly it ended. Readers skip
// kinds they do not know.
//
// Writer and Reader hold one frame at most; a Writer may be used by one goroutine
// at a time (its signs of life come by themselves), and so may a Reader. Anyone may
// import this package.
package resultstream
