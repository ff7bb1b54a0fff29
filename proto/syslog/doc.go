// Package syslog forwards hash chains of audit entries (package auditchain) to a syslog server: RFC 5424
// messages over a unix datagram socket, UDP (RFC 5426), TCP with octet counting (RFC 6587) or TLS (RFC 5425).
//
// An entry is one message:
//
//	<85>1 2026-11-22T18:00:00.123Z HOST APP PID ACTION [meta sequenceId="17"] {"sequence":17,…}
//
// ACTION is the entry's, the rest of the line is the entry as the chain has it, byte by byte, so that what the
// server keeps can be verified (postern audit verify --file). Entries too long for a message have their texts cut; those
// begin with {"cut":true, instead, and their hash is the whole entry's.
//
// Nothing is queued: a Forwarder reads the chain itself, from a position that its owner keeps on
// stable storage, and moves that when the server has what is before it. What cannot be sent waits in the chain. Syslog
// has no answers; a TCP connection's bytes count as delivered when the server's kernel has them and the
// connection lived for Settle more, a datagram when the local kernel took it and as long passed. So an entry
// comes at least once; after a break the last ones may come twice, with their number. UDP loses what the
// network loses.
//
// A Forwarder's Run is for one goroutine; Stats may be called from any.
package syslog
