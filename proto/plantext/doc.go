// Package plantext prints a plan, given as JSON (EXPLAIN's FORMAT JSON, or the part of
// it that a data source's policy lets out), as the lines that people read: the tree
// of PostgreSQL's form, which those of SQLite have as well, and for the objects of
// MySQL and MariaDB an outline. It has no state.
package plantext
