// Package fusefs serves a replica to the kernel: a fuse.RawFileSystem whose node ids are
// the workspace's, so that a process may take over a mount from the one before it.
//
// There may be several file systems on a replica. An ordinary one shows owners and modes as
// they are, and the kernel checks permissions. A squashing one is for callers who are all
// the owner: it shows one user and group for everything.
//
// A file that is here whole is passed through: the kernel reads and writes the backing file itself, and this
// package hears of opening, Flush and closing only. Every handle on a file is of one kind
// until the last one is closed, because the kernel wants it so.
//
// Handles have no state but their kind, which is their number. Locks are the kernel's own.
// Times for which the kernel may keep names and attributes are long, because changes from
// elsewhere are pushed.
package fusefs
