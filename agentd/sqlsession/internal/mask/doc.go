// Package mask masks values of PostgreSQL's types: what the rules of a data
// source's policy say becomes of one column's values ([Column]), and of what
// matches patterns inside of texts ([Texts]).
//
// It is pure: which columns are masked is for package lineage to say. A Column
// has scratch memory and belongs to one goroutine. NULL stays NULL.
package mask
