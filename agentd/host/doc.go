// Package host answers what the control plane asks inside the tunnel:
//
//	POST /postern/v1/sql               a statement; the rows come back as Arrow
//	GET  /postern/v1/metrics           this agent's metrics
//	POST /postern.v1.HostService/...   the RPCs of host.proto
//
// Everything else is NOT_FOUND. Each request is held against the host's own
// policy here, whoever asks. A statement leaves two entries in the audit log:
// "sql.begin" is on stable storage before the statement is sent to the database,
// "sql.run" says how it ended and repeats who, what and where, so that it stands
// alone. A refused statement leaves "sql.run" alone. What was begun when agentd
// died gets "sql.lost" at its next start (Recover). Without an entry nothing
// runs: when the log cannot be written, statements are refused.
//
// Policy, SQL sessions and audit log are given as the small interfaces below.
// A Host may be used from several goroutines.
package host
