// Package proto holds what both sides of the tunnel and the public API must
// agree on beyond the messages themselves (package posternv1): error codes with
// their mappings, the outcome trailer of a streamed result, the protocol version,
// and ids. It imports nothing of ours but the generated code, and everything may
// import it. All functions are safe for concurrent use.
package proto
