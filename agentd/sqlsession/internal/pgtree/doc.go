// Package pgtree parses PostgreSQL statements with PostgreSQL's own grammar
// (libpg_query, compiled to WebAssembly).
//
// The parser takes a second and some memory to start, so the processes of SQL
// sessions do not have it: they ask one process of the host that has it, see
// [Parser]. [InProcess] is that process's own, and that of tests.
package pgtree
