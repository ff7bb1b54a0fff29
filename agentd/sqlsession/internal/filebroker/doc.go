// Package filebroker lets a process without rights use the files of one SQLite
// database. agentd serves a socket ([Serve]); the process asks ([Client]) for one of
// four files by number, never by name, and gets an open descriptor, if the source's
// policy lets it: a read-only source's database is opened for reading alone, so the
// kernel itself refuses to write to it.
//
// A request is three bytes (what to do, which file, flags); the answer is four bytes,
// an errno in little endian, and the descriptor where there is one. Messages are those
// of a SOCK_SEQPACKET socket. What is malformed ends the service.
package filebroker
