// Package pagestore keeps CRIU image directories on the host's disk: small,
// encrypted, and whole after a power cut.
//
// The words:
//
//   - A checkpoint is one or more file trees (CRIU's images, a copy of the kernel's
//     private directory) under one id, with its [Meta]. Put stores it after the
//     kernel was thawed, Restore writes it out again.
//   - A chunk is 4096 bytes of a file, zero-padded at the end of the file. Pages lie
//     in pages-*.img at multiples of 4096, so a chunk of such a file is exactly one
//     page of memory, wherever it moved to: chunks of 4 KiB need no knowledge of
//     virtual addresses, and store less than 8 or 16 KiB aligned to them (measured:
//     docs/performance.md). A chunk of zeros is a hole and takes no space.
//   - A segment is up to 32 new chunks, compressed together (by LZ4 when they are new,
//     since restores wait for it; by zstd when Collect writes them again; as they are if
//     that saves less than an eighth) and sealed with AES-256-GCM.
//   - A pack is a file of up to 512 segments, written once. Checkpoints refer to
//     chunks by pack and number; a pack that is rewritten without its dead chunks
//     keeps the numbers of the living, so no checkpoint has to be rewritten.
//
// On disk, all sealed but for the names:
//
//	DIR/lock                                    held while the store is open
//	DIR/ORGANIZATION/packs/PACK.pack            header | segments | table | hashes | trailer
//	DIR/ORGANIZATION/checkpoints/ID.files       names, modes, sizes, runs of chunks
//	DIR/ORGANIZATION/checkpoints/ID.meta        what it is; its rename is the commit
//
// Organizations share nothing: each has its own directory, and keys for hashing and
// sealing derived (HKDF-SHA256) from the host's key and its id. A chunk is known by
// the first 128 bits of its HMAC-SHA256 under the organization's key, so neither
// equal contents nor guesses of contents show on disk or across organizations. Every
// pack has a key of its own from a random salt. The host's key is a [Ring]: RotateKey adds
// one that seals from then on, files bear the id of theirs, Reseal moves the older files
// to it and drops the keys that nothing needs; the hashes' keys stay. What was altered, cut, exchanged or
// renamed fails its authentication and is refused with [ErrDamaged]. What the store
// can't see is that somebody put a whole older state of its directory back.
//
// Every file is written under a temporary name, synced, renamed, and its directory
// synced, before the next one that refers to it: packs, then files, then meta. A
// crash leaves at most packs that nothing refers to, which Open and Collect remove.
//
// Memory: Put takes about 24 MiB plus 40 bytes for each new chunk (10 bytes per KiB),
// and the index of known chunks 40 bytes each, up to [Options].IndexChunks; chunks
// beyond that are stored again rather than found. Restore takes 16 bytes for each
// run of neighbouring chunks and less than 2 MiB for each worker.
//
// A Store is safe for concurrent use. Package agentd/checkpoint drives CRIU and calls
// this one; the store itself knows nothing of CRIU but the shape of its directories.
package pagestore
