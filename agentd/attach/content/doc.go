// Package content keeps the contents of a replica's files on this host: one sparse
// file for each node, DIR/xx/ID, which may be handed to the kernel as it is.
//
// A file that is not here as a whole has a map beside it, DIR/xx/ID.map: the version, the
// SHA-256 of each chunk of 1 MiB, and a byte for each chunk that says whether it is
// here and whether it was changed here. Chunks come when they are read, and ahead of a
// reader who goes on in order. A chunk that came from the control plane is checked against its
// hash when it arrives, and again when this process uses it for the first time;
// one that is damaged on disk is fetched again.
//
// Memory: one byte for each chunk of an open file, 1 MiB for each of at most 4
// fetches on their way. Locks are taken in the order replica, Store, File. Only packages
// below agentd/attach import this one.
package content
