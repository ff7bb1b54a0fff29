// Package notebook runs notebooks (nbformat 4) on a kernel: once, or again and
// again while they are edited. It does no I/O: a [Kernel] is who runs cells, and files are the
// business of client/notebookfile.
//
// A [Document] is a file as it was read. Writing outputs into it changes the bytes of
// the cells' outputs and execution counts and no other: the order of keys, the
// indentation and what this package does not know stay as their editor left them.
// [Outputs] gathers what a kernel sends for one cell in the form that a file holds.
// [Chain] says of which cells a kernel's state is the result, and so which cells an
// edit makes stale.
//
// Nothing here is safe for concurrent use unless it says so.
package notebook
