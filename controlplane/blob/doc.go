// Package blob keeps chunks of files in an object store: a directory, or a bucket that
// speaks S3. It knows nothing of files, versions or workspaces but their numbers.
//
// A chunk is at most 1 MiB and named by its SHA-256. Each organization has each chunk
// once, however many workspaces hold it. An object's name is a keyed hash of the chunk's,
// followed by random text, so the object store learns neither what is in a chunk nor
// whether a known file is there; its body is sealed with a key of the organization, together with
// the chunk's hash. What is read is opened: an altered object is an error, never a file. Who gets chunks
// from Each hashes them again, Get has done so.
//
// An object is written under a name that was noted before, and a chunk counts as stored
// when the object is durable and the note has become a row. So whenever a process ends,
// each object is either known, noted, or garbage that Collect removes; and as no name is
// used twice, a removal that comes late removes nothing else.
//
// All methods may be called concurrently. Memory is the caller's chunks and, for each of
// at most 8 uploads of a call, a sealed copy; or the 8 chunks that Each has in memory.
package blob
