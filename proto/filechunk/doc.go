// Package filechunk says how the contents of files are cut into chunks, how chunks
// are named, and how they travel: what clients, hosts and the control plane must
// agree on to the byte. It may be imported by all sides, keeps no state, and starts
// no goroutines.
//
// A file of size bytes has Count(size) chunks, of Size bytes each but the last. A
// chunk's name is the SHA-256 of its bytes; a chunk of zeros is a hole: its name is
// empty, and it is neither stored nor sent.
//
// On the wire chunks are frames, one behind the other: the length as 4 bytes, big
// endian, 1 to Size, then the bytes.
package filechunk
