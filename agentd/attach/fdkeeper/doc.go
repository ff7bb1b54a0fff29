// Package fdkeeper is the process that lets mounts outlive the process that serves them.
//
// The keeper holds, for each FUSE connection, its /dev/fuse descriptor, a mount of its
// root in a mount namespace that holds nothing else, and a blob that the next server
// needs (fuseserver.Saved and the like). It starts the server, mountd, and starts it again
// whenever it ends. A new server claims the connections; that is granted when the one
// before is dead, which the keeper sees to. So a crash and an upgrade are the same: the
// upgrade only begins with a second server.
//
// It is also the watchdog. A connection that nobody serves although somebody has waited
// for it for Patience is aborted: whoever waits gets ENOTCONN instead of sleeping where
// no signal reaches it. A server that stopped saying that it lives, while somebody waits,
// is killed.
//
// The keeper never touches a path below a mount, knows nothing of workspaces, and changes
// rarely. If it dies the connections go on, for the server has descriptors of its own: it
// starts another keeper and gives it everything. If both die at once the connections end.
//
// The protocol is one JSON message per packet on a unix socket (SOCK_SEQPACKET), with
// descriptors beside it, and one answer for each; only root, or the keeper's own user,
// is let in. Only the server that has claimed may change anything.
package fdkeeper
