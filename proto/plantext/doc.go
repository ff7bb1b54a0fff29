// Package plantext prints a plan of PostgreSQL's, given as JSON (EXPLAIN's FORMAT
// JSON, or the part of it that a data source's policy lets out), as the tree of
// lines that people read. It has no state.
package plantext
