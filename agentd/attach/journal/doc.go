// Package journal is the durable memory of a replica: an append-only list of entries,
// of which each is there whole or not at all.
//
// A journal is a directory of segments, NAME journal-N with N counting up. Every segment
// begins with a dump of all that was known when it was begun, ended by a mark; the newest
// segment whose dump is whole is the journal, and older ones are removed. Each entry is
//
//	magic    4 bytes  "PJe1"
//	length   4 bytes  of the payload, little endian; at most MaxEntry
//	synced   8 bytes  how much of the segment was known to be on disk when it was written
//	kind     1 byte   entry, dump entry, end of the dump
//	crc      4 bytes  CRC-32C of length, synced, kind and payload
//	payload
//
// The first segment is on disk as a whole before it has its name, so that a newest segment that is not
// whole always has one before it.
//
// Append hands an entry to the kernel, so it survives the end of this process; Sync makes
// all that was appended survive the end of the machine, one fdatasync for all who wait.
//
// After a loss of power the end of a segment may be torn. It is cut off, but only if
// no later entry says that the torn bytes had been synced: then the disk lost what it had
// promised, and Open returns ErrCorrupt instead of forgetting silently.
//
// Behind the entries are up to some MiB of zeros, so that a sync costs the disk only the entry.
//
// Whoever owns a Journal closes it. All methods may be called from any goroutine. Only
// packages below agentd/attach import it.
package journal
