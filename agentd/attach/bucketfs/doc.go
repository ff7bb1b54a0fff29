// Package bucketfs shows a bucket (package bucket) as a file system: a fuse.RawFileSystem
// that a process may take over from the one before it.
//
// Names, sizes and times are believed for TTL. Contents are read in chunks of 1 MiB, named by
// the object's ETag, with read-ahead, and kept in a cache on disk with a limit. A file
// that is written to has a stage, a local copy of it all, which becomes the object when a handle
// is closed or synced: whoever reads the bucket sees the old object or the new one. A stage that could not
// be uploaded when its file was closed, which is an error of close, is kept and tried again; one whose
// file was never closed is thrown away in the next life, so that no torn file replaces an object.
//
// Files of the state directory:
//
//	cache/XX/ID-N    a chunk: its bytes, then their SHA-256
//	staged/ID        a stage's content
//	staged/ID.json   what is known of it: see record
//	nodes-SLOT.log   node ids, names and open handles, for the next process: see line
//
// Locks: Bucket.mu guards all memory and is never held during requests or file I/O of
// contents. A stage's uploading is held during its upload, and taken before mu.
package bucketfs
