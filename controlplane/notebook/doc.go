// Package notebook runs notebooks for callers of the API: once (Run), or in step with
// cells that the caller edits (Sync). What a notebook is, and what an edit makes
// stale, is package proto/notebook's; this package has the kernels' side of it, and turns
// what happens into events.
//
// Words: a book is what is known of a notebook's kernel: of which cells its state is the
// result. Books are in memory, 256 at most, the least used goes first; what they know is
// in the labels of the kernel's checkpoints as well, so that a control plane that was
// restarted, or another one, goes on from there, after one rollback.
//
// A run belongs to its caller's request: it ends with it. One goroutine runs cells and
// makes events, the caller's sends them; between them at most 256 events wait, without the
// results of cells at most 4 MiB. Of outputs as they come some are left out when the caller
// is slow; for a caller that takes nothing for 30 s the run ends.
package notebook
