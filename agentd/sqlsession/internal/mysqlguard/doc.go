// Package mysqlguard decides by tokens alone what a statement for MySQL or MariaDB
// may do: there is no parser of their grammar that could be trusted. So it refuses
// what it does not know: comments that are executed, hints, words that write, lock or
// assign, and every call of a function that is not on a list of harmless ones.
//
// It is one layer of several (see docs/sql.md): the server holds the transaction
// read-only, the statement goes by the prepared protocol, which takes one statement,
// and the views that a statement may use are looked at by the caller, who hands their
// definitions to View.
//
// Everything here is pure and safe for concurrent use.
package mysqlguard
