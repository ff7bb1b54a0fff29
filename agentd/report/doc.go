// Package report tells the control plane of the statements that kernels of this host
// asked data sources for (%%sql, postern.sql). They run here, also while the link is
// away; the host's log has them, and a Reporter brings them from there to the control
// plane's history and audit chain, in the log's order.
//
// Nothing is kept here of how far that is: the control plane keeps it, in the transaction
// that records what was told, and says it when asked. So each statement is recorded
// once, whichever side is killed when, and a control plane that was restored from a backup
// gets again what it has forgotten.
//
// What the log has not (codes of errors, first and last rows) is kept in memory, up to
// 32 MiB, until it is told; when agentd ends before that it is lost, and the statements
// are told without.
//
// Run is for one goroutine; other methods may be called from any.
package report
