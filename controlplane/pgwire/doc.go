// Package pgwire is where clients of PostgreSQL connect to the control plane: psql,
// drivers, BI tools.
//
//	client ──TCP, TLS──▶ Server ──tunnel, package wirestream──▶ host ──▶ database
//
// The server answers for what comes before a session: TLS (asked for by SSLRequest, or
// direct), startup, the password, which is an API token, and CancelRequest. It finds
// the agent that dbname=AGENT/SOURCE names, has the host open a session and from then
// on passes bytes on, both ways, as they come: the host enforces its policy, and
// neither statements nor rows are understood here. Only the headers of messages are
// looked at, to know where one ends and whether the session is idle, so that a session
// can be ended between two messages with an ErrorResponse that says why.
//
// What the host tells of statements goes to a Journal: history and audit.
//
// Strangers cost little: at most Limits.Strangers connections are not yet
// authenticated, each for at most Limits.Handshake, with at most 10,000 bytes of a
// startup message; when there are more, the address with the most loses its oldest.
package pgwire
