// Package enginetest holds the suite that every engine of package sqlsession passes:
// the same cases on PostgreSQL, MariaDB and SQLite, and attacks on sources that are
// read-only. It has tests alone.
package enginetest
