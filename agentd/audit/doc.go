// Package audit is the host's append-only, hash-chained log (package auditchain
// says what an entry is). On disk, below the state directory:
//
//	audit/                 0700
//	  000001.jsonl         0600, one entry a line, at most about 16 MiB
//	  000002.jsonl         goes on where the one before ends
//	  torn-20261122T…      what a crash left of a half-written last line
//
// Append returns when the entry is on stable storage (AppendSoon when the kernel has it,
// 100 ms at most before that); entries that come at the
// same time share one fsync. An entry that could not be written (a full disk) is
// an error with code STORAGE_FULL and leaves the chain as it was: the caller
// refuses what it wanted to do.
//
// Open checks the newest segment and its seam with the one before. Only an
// unterminated last line, which is what a crash leaves, is moved aside; anything
// else is tampering or a damaged disk, is returned as a *TamperedError, and is
// never mended. Verify checks all of it, offline too.
//
// Nothing is ever deleted unless SetRetention says what: then RunRetention drops the oldest segments
// whole (000001.jsonl, 000002.jsonl, ...), after an entry was written that stands for them, and numbers go
// on: both of the segments and of the entries. What follows verifies as before; whatever else
// is missing at the beginning does not.
//
// A Log may be used from several goroutines; one process at a time may have it
// open. Reading is possible meanwhile, from other processes too.
package audit
