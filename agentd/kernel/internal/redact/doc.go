// Package redact takes the values of secrets out of what a kernel says.
//
//	form    a value as it may stand in a text: itself, one of its longer lines, as
//	        Python's repr, in JSON, base64 (at each of three alignments), hexadecimal, URL
//	        and HTML quoting write it
//	Set     all forms of all secrets of a kernel; it changes texts and JSON
//	Stream  one output stream, whose messages together are searched: what may be the
//	        beginning of a form at a message's end is held back until it is known
//
// It keeps accidents in, not a user who wants a value out: who has a secret may write it
// backwards.
//
// A Set is immutable and safe for concurrent use; a Stream is not. It is pure.
package redact
