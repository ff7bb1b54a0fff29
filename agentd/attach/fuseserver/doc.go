// Package fuseserver serves a fuse.RawFileSystem on a /dev/fuse descriptor that
// somebody else keeps, so that a server can die, by kill -9 too, and another one goes
// on with the same mount: no open file breaks, and requests that the dead one had read
// are answered by its successor.
//
// go-fuse's own Server cannot do that: it waits for an INIT request that the kernel
// sends once in a connection's life. Here the first start and a takeover are the same
// code: New takes the Saved state of a life before, gives the INIT request to go-fuse's
// ProtocolServer again, tells the kernel to send again what was read and not answered
// (FUSE_NOTIFY_RESEND), and Serve reads. Requests that were sent again have bit 63 of
// their unique set; whoever must not do one twice remembers the unique.
//
// Words: a connection is one superblock of type fuse, between mount(2) and the end of
// the last descriptor; its number in /sys/fs/fuse/connections is the minor of its
// st_dev. A backing is a file that the kernel itself reads and writes for an open file
// (FUSE_PASSTHROUGH, Linux 6.9); its id lives in the connection and thus longer than a
// server, so it is kept in a table on disk.
//
// A process must never open, stat or exec anything on a mount that it serves: if its
// threads are all there nobody is left to answer, and then not even SIGKILL helps. Only
// Abort does.
package fuseserver
