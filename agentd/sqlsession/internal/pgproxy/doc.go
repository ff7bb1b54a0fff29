// Package pgproxy stands between a client of PostgreSQL's own protocol and the
// database, in the process of a SQL session: a Proxy has one authenticated
// connection to the server, and frames to and from agentd that hold what the client
// says after startup.
//
// Every message of the client is understood before anything is passed on; what is
// not understood ends the session. Every statement is parsed and held against the
// policy before the server sees it. One cycle of the client (a Query, or messages up
// to Sync or Flush) is in the server's hands at a time, so that a verdict holds when
// its statement runs.
//
// A refused statement is not sent. In its place goes a text that is no SQL, so that
// the server itself does what follows an error: it fails the transaction, or skips
// to the client's next Sync. The server's complaint about that text is replaced by
// the reason of the refusal.
//
// What the server says is scanned by the heads of its messages and passed on in big
// pieces. A slow client stops the server; a cancel, a limit or a timeout then
// drops what rows are left, so that the server is free at once.
//
// Words: a cycle is what the server answers before it waits again; a statement is
// what the log has one entry for; a text is what stands in a Query or Parse, and may
// hold several statements.
//
// Only package child, which starts the process, and tests import it. A Proxy has
// one goroutine that runs it (Run); the other methods may be called from others.
package pgproxy
