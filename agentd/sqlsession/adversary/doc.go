// Package adversary attacks SQL sessions; it has tests only.
//
// A real PostgreSQL server holds a world of traps (testdata/world.sql): views,
// operators, casts, aggregates, domains and shadowing functions that hide what
// acts outside of a transaction, and canary values wherever a value can hide.
// The data source's role is a superuser. Each statement of a corpus
// (testdata/*.sql) runs through a real [sqlsession.Manager] and its child
// process; before and after it the whole state that a later session could see
// is compared: see state in state_test.go for what that is.
//
// Modes that must not tell values are held to more than a search for canaries:
// every statement runs against two databases that differ in nothing but those
// values, and all that comes out must be the same, byte by byte.
package adversary
