// Package criu drives CRIU: it dumps and restores the process tree of one kernel.
//
// Words as CRIU's own: a dump writes an image directory, leave-running lets the tree
// go on afterwards, an external resource is one that stays outside the images and is
// named by a key on both sides.
//
// CRIU runs under a helper process, `agentd criu-helper`, because go-criu knows no
// deadline, hands its socket to whatever is started beside it, and hides its child:
//
//	agentd or shim ── helper (own process group) ── criu swrk ── the restored tree
//	      │  stdin: the request, then silence; its end ends the helper
//	      └  fd 3:  events as JSON lines, the last one is the answer
//
// The helper's end, for whatever reason, ends CRIU: it finds its socket closed, undoes
// what it did to the tree, and after a grace time the whole process group is killed.
// A restored tree is the helper's child and so, when that ends, a child of the nearest
// subreaper above it: the caller, if it called [Subreaper].
//
// Only agentd/checkpoint and its tests may import it. All methods may be called from
// any goroutine; calls for one tree must not overlap.
package criu
