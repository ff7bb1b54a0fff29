// Package lineage finds out which columns of a PostgreSQL statement's result
// may tell of masked columns.
//
// It follows names through the parse tree as the server does (aliases,
// subqueries, CTEs, joins, views by their definitions) and gives for each column
// of the result what it depends on: nothing masked, a plain copy of one masked
// column, or something made of masked columns. It also judges how masked
// columns are used beside the result (WHERE, JOIN, ORDER BY, ...).
//
// What it does not understand it refuses: a [Refusal] is the only way out of
// doubt. Names of relations and functions are looked up by a [Catalog], which
// must ask the server in the same transaction in which the statement runs, so
// that both see the same search_path. It is pure otherwise, and bounded: 2,000
// relations, 100 levels of nesting.
package lineage
