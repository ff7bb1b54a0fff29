// Package replica is a host's copy of one workspace: what is in the tree, the contents
// that were read or written here, and what the control plane has not got yet. It has the
// operations of a file system, and is served to the kernel by package fusefs.
//
// A change is made in memory and written to the journal before its caller is answered,
// so it survives the end of this process; Fsync and the Flush of a changed file return when it survives the end
// of the machine. Operations go to the control plane in the order in which they were made, by one
// goroutine; another takes over what changes elsewhere. What is not here is fetched when it is
// needed, within Config.Deadline, or is EIO.
//
// A loss of power may keep the journal's word for a change and lose the change, or the other way round, as
// long as nobody was promised it. So a content is only removed, as room or because its node is gone, when the
// journal's word for that is durable; ids of lost nodes under which something lies are not used again; and files
// are looked at before the journal is believed.
//
// Names and attributes are in memory, within Config.MetadataBytes: beyond it, what directories hold that
// nobody uses is forgotten if the control plane can say it again and the kernel has let go of it, and
// listed again when somebody looks. What has not been sent, is open, or is in use is never forgotten.
//
// Errors of operations are syscall.Errno. One lock, mu, is over the tree and all that goes with
// it; it is held for memory and the page cache, never for the network or a sync.
//
// Only agentd/attach's packages import this one. It does not know FUSE.
package replica
