// Package child is the process of one SQL session: it holds one connection to
// a database, runs one statement at a time for agentd, and turns the rows into
// an Arrow IPC stream.
//
// agentd starts it as a copy of its own binary without privileges, with an
// empty environment, and with one socket (see package frame) over which it
// gets the credentials. [Main] is its main. It ends when that socket closes,
// after a real cancel of the statement under way.
//
// The connection is made by pgconn (authentication, TLS); from then on the
// process speaks the protocol itself, so that a row goes from the socket's
// buffer into the columns of a record batch with one copy and no allocation.
//
// Goroutines: main runs statements; one reads agentd's frames; one writes
// frames, so that a slow reader never keeps a cancelled statement alive; one
// delivers a cancel request while a statement is being cancelled. Memory is
// bounded by the buffers (about 4 MiB) plus the largest row.
package child
