// Package pgtree parses PostgreSQL statements with PostgreSQL's own grammar
// (libpg_query, compiled to WebAssembly).
//
// The parser takes a second and a quarter of a gigabyte to start, and the grammar
// is C: so it runs in a process of its own, with no credentials, no files and no
// network, that the processes of SQL sessions ask. [Serve] is that process's main
// loop, [Client] the session's side. agentd stands between them only to introduce
// them to each other: a session writes a [Lane]'s letter to the socket that it was
// started with (the introducer), and gets one byte back: [Introduced], with a
// descriptor of a connection to the parser of that lane, or [NoParser].
//
//	session                      agentd                        parser
//	   │── 's' ────────────────────▶│── one end of a socket pair ──▶│
//	   │◀─ 'k' and the other end ───│                               │
//	   │── length, text ───────────────────────────────────────────▶│
//	   │◀─ kind, length, payload ───────────────────────────────────│
//
// All numbers are big endian; lengths count bytes in four bytes. Kinds are 't' (a
// tree: a pg_query.ParseResult), 'e' (a syntax error: four bytes of its position in
// characters from 1, then the message) and 'x' (too complex: no payload).
//
// There are two lanes, each a process: texts that are surely quick to parse, and
// the others. A text that brings the parser down ends its process, which agentd
// starts again: the library puts a broken parser back in use. Texts in the small
// lane can't: see [Measure].
//
// Everything here is safe for concurrent use. [InProcess] parses in this process;
// it is the parser process's own, and that of tests.
package pgtree
