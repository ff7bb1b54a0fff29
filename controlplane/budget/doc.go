// Package budget bounds the memory that the bodies of requests take together, for handlers that read a body whole: each
// message is bounded by itself, but a peer may send many at once. It imports nothing of ours. A Budget is safe for
// concurrent use and starts no goroutines.
package budget
