// Package sqlsession runs SQL statements for agentd, each in a sandboxed,
// unprivileged child process that holds one database connection: a SQL
// session.
//
// A [Manager] starts the processes, keeps a warm one for each data source in
// use, gives one to each statement and copies the Arrow IPC stream that it
// makes to a writer, with back-pressure all the way to the database. A process
// belongs to one owner from its first statement on and is never lent to
// another; between statements its database session is rolled back and reset
// (ROLLBACK, DISCARD ALL). Credentials are read afresh for each connection and
// travel over an inherited socket only; the process has an empty environment.
//
// The process is agentd's own binary: main calls [ChildMain] first when its
// first argument is [ChildArg]. As root, each has a user id of its own
// (Config.UIDBase + slot); always it has no_new_privs, no capabilities, no
// core files, Landlock rules (no file may be written, few read, no port bound)
// where the kernel has them, and it ends when agentd does, after a real cancel
// in the database; but that of a session that stays open waits for the next agentd,
// where Config.Hold says so: see hold.go.
//
// This package imports no other capability: policy and credentials come in as
// plain values and functions. A Manager is safe for concurrent use; every
// goroutine and process that it starts has ended when Close returns.
package sqlsession
