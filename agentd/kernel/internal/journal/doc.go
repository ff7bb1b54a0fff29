// Package journal keeps every message of a kernel in a ring of files on the host
// until there is no more room, so that a client that was away gets what it missed,
// in order and once.
//
//	DIR/sequence     40 bytes: boot id, reserved and floor (sequence numbers), CRC-32C
//	DIR/0000000001.seg ...   segments: records one behind the other
//
// A record is
//
//	length    4 bytes, little-endian as all that follow: of client and payload
//	checksum  4 bytes: CRC-32C of the rest
//	sequence  8 bytes: of a message; of other kinds the newest so far
//	kind      1 byte, see the constants
//	client    1 byte of length, then as many bytes: whose it is; of none: everybody's
//	payload   a message: posternv1.KernelMessage as protobuf
//
// Beside messages, the journal remembers for each client up to where it confirmed,
// and which requests were sent to the kernel and not answered. Each segment begins
// with a snapshot of that, so the oldest segment can go at any time.
//
// Bounds. All segments together take Config.MaxBytes at most, plus what was removed
// and is still being read (a segment, an eighth of that, for each reader). When there
// is no more room the oldest segment goes; a message larger than the ring, or one that
// a full disk does not take, is not kept. A reader is told of either as a gap. Memory is
// one record's small parts, 256 KiB for each reader, and the clients and requests:
// MaxClients and the caller's bound.
//
// What survives. A record is written before Append returns: kill -9 loses nothing
// that was appended; a half-written record at the end is cut off. Against a loss of power
// the file is synced when nothing was appended for a second, every five seconds
// otherwise, and by Sync; sequence numbers are reserved on the disk ahead, so none is
// used twice even when records were lost.
//
// A Journal may be used by several goroutines, a Reader by one. One process at a time
// has a directory open (flock).
package journal
