package tree

import "maps"

// Root is the id of the directory at the top.
const Root = 1

// Type tells what a node is; its values are proto's NodeType.
type Type uint8

// The types of nodes. There are no others: no devices, sockets and pipes.
const (
	File      Type = 1
	Directory Type = 2
	Symlink   Type = 3
)

// Flags of a node. All are journaled.
type Flags uint8

const (
	// Local: the whole content lies on this host.
	Local Flags = 1 << iota
	// Partial: some chunks lie on this host, and content has a map of them.
	Partial
	// Dirty: the content here is newer than Version, and is not uploaded.
	Dirty
	// Writing: it may have been written to since Stamp; who opens the replica looks.
	Writing
	// Redo: the content of the last close lies in the journal, not for sure in the file.
	Redo
	// Mapped: it was opened for writing by passthrough since the host started, so somebody may
	// have it mapped and change it without a word.
	Mapped
	// Cached: it was opened through the daemon, and every handle on it must be so until the
	// last one is closed.
	Cached
)

// Node is a file, a directory or a symbolic link. Times are nanoseconds since 1970.
type Node struct {
	ID    uint64
	Type  Type
	Flags Flags
	// Mode has permission bits and the sticky bit, 01777.
	Mode     uint16
	UID, GID uint32
	Size     uint64
	Mtime    int64
	Ctime    int64
	Btime    int64
	Atime    int64
	// Links counts the names of a file in the whole workspace; 0: it is removed, and
	// stays for those who have it open.
	Links uint32
	// Version is the control plane's version that the content is, or is based on.
	Version uint64
	// Seq is the workspace's sequence number of the last change that was taken over.
	Seq uint64
	// Stamp is the backing file's change time when Size and Mtime were last taken from it.
	Stamp  int64
	Target string
	// Xattrs are never changed in place.
	Xattrs map[string]string
	// Parent is the directory that a directory is in. For others it is one that had it.
	Parent uint64

	// Dir is what is in a directory, nil for others. It is not part of the record.
	Dir *Dir
	// Names counts the names of it that are known here; 0 for the root.
	Names uint32
}

// Has tells whether all of the flags are set.
func (n *Node) Has(f Flags) bool { return n.Flags&f == f }

// Clone returns a copy to change and give to Put.
func (n *Node) Clone() *Node {
	c := *n
	return &c
}

// WithXattr returns n's attributes with one more, or without it when value is nil.
func (n *Node) WithXattr(name string, value []byte) map[string]string {
	m := maps.Clone(n.Xattrs)
	if value == nil {
		delete(m, name)
		return m
	}
	if m == nil {
		m = map[string]string{}
	}
	m[name] = string(value)
	return m
}

// Nlink is the number of links that stat shows: for a directory its own name, "." and
// the ".." of each directory in it; 1, which says that it is not known, before it was
// listed.
func (n *Node) Nlink() uint32 {
	if n.Type == Directory {
		if n.Links == 0 {
			return 0
		}
		if !n.Dir.Loaded {
			return 1
		}
		return 2 + n.Dir.subdirectories
	}
	return n.Links
}
