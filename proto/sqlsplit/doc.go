// Package sqlsplit cuts what people type into SQL statements, and finds the
// placeholders in one, by the rules of the engine that it is for: which quotes there
// are, whether a backslash counts in them, what a comment is, and which statements
// have semicolons within. It reads tokens only; the server has the last word on what
// is right, and the host on what may run.
//
// The host's own reading of statements (agentd/sqlsession/internal/sqltext) has the
// same rules; a fuzz test there holds the two against each other. This one goes line
// by line and never reads a text twice.
//
// Everything here is pure. A Splitter belongs to one goroutine.
package sqlsplit
