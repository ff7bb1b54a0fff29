// Package pgcatalog tells which statements read nothing but PostgreSQL's catalog,
// and of it nothing that holds data: those may run where only metadata is told.
//
// It judges the parse tree, by names alone and so that it refuses too much rather
// than too little. That a name means the server's own relation the caller must
// find out from the server. It knows no connection; only agentd's SQL session
// process imports it. Its functions are safe for concurrent use.
package pgcatalog
