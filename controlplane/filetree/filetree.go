package filetree

import (
	"context"
	"crypto/sha256"
	"errors"
	"time"
)

// Numbers of nodes with a meaning of their own.
const (
	Root         = 1
	Trash        = 2
	LastReserved = 15

	// NoBase is what redirects have instead of a version for operations without one.
	NoBase = 1<<63 - 1
)

const (
	// SegmentChunks is how many chunks one segment of a file's list of chunks has.
	SegmentChunks = 1024
	// MaxName is the longest name of an entry, in bytes.
	MaxName = 255
)

// Hash is the SHA-256 of a chunk, or of a segment; of all zeros, it stands for a chunk
// that is a hole.
type Hash = [sha256.Size]byte

// Type is what a node is. Its values are those of posternv1.NodeType.
type Type uint8

// The types of nodes.
const (
	File      Type = 1
	Directory Type = 2
	Symlink   Type = 3
)

// Workspace is a workspace's row.
type Workspace struct {
	// Number is the store's own key; zero in what InsertWorkspace takes.
	Number                 int64
	ID, Organization, Name string
	Created                time.Time
	// Seq is the number of the last change, and NextID the next free node number.
	Seq, NextID uint64
	// SnapshotSeq is the Seq of the newest snapshot; zero: there is none.
	SnapshotSeq uint64
	// OldestChange: changes with this Seq and later ones are all in the log.
	OldestChange uint64
	// QuotaBytes and QuotaNodes bound UsedBytes and Nodes; zero: no limit.
	QuotaBytes, QuotaNodes uint64
	// UsedBytes is what the current contents take, holes apart; KeptBytes what all
	// contents take that are kept, each chunk counted once.
	UsedBytes, KeptBytes uint64
	// Nodes counts what is below the root.
	Nodes uint64
	// KeptRows counts the rows that are kept: nodes that are there or in the trash, names of
	// files beyond their first, versions, and what snapshots know of nodes and names.
	KeptRows uint64
	// Agents are the names of those that may mount it; empty: all.
	Agents []string
	// KeepVersions and KeepFor bound the history of each file, and KeepFor the trash.
	KeepVersions uint32
	KeepFor      time.Duration
}

// Node is a node's row. Times are nanoseconds since 1970.
type Node struct {
	ID           uint64
	Type         Type
	Mode         uint32
	UID, GID     uint32
	Size         uint64
	Stored       uint64 // bytes that are no holes
	Mtime, Ctime int64
	Btime        int64
	Links        uint32
	Version      uint64
	Seq          uint64
	Target       []byte
	Xattrs       []byte // encoded; nil: none
	Parent       uint64 // with Name: one of its names
	Name         []byte
	Inline       []byte // with HasInline: the content; only from List and Nodes
	HasInline    bool
}

// Entry is a name in a directory.
type Entry struct {
	Parent uint64
	Name   []byte
	Node   uint64
	Seq    uint64
}

// Listed is an entry with its node.
type Listed struct {
	Entry
	Of Node
}

// Version is a version of a file's content.
type Version struct {
	Node, Version, Base uint64
	Size, Stored        uint64
	Created             time.Time
	// By is "token NAME" or "agent NAME".
	By   string
	ETag Hash
	// Segments are the hashes of the list's segments; Inline is the content instead.
	Segments []Hash
	Inline   []byte
}

// Change is a line of the log of changes.
type Change struct {
	Seq   uint64
	Mount string
	Node  uint64
	// Names is an encoded posternv1.NodeChange with nothing but added and removed.
	Names []byte
}

// Chunk is a chunk that a workspace holds.
type Chunk struct {
	Hash Hash
	Size uint32
}

// Conflict is what was kept under another name.
type Conflict struct {
	Seq          uint64
	Path, KeptAs []byte
	KeptID       uint64
	Time         time.Time
	Agent        string
}

// Trashed is an entry of the trash.
type Trashed struct {
	ID, Node     uint64
	Path         []byte
	Removed      time.Time
	By           string
	Files, Bytes uint64
}

// Snapshot is a name for the state of a workspace after the change Seq.
type Snapshot struct {
	ID, Name     string
	Seq          uint64
	Created      time.Time
	By           string
	Nodes, Bytes uint64
}

// Mount is a workspace that a host has mounted.
type Mount struct {
	Agent, ID string
	ReadOnly  bool
	LastOp    uint64
	Opened    time.Time
}

// MountReport is what an agent said last of a mount.
type MountReport struct {
	// Workspace is the workspace's name, Agent the agent's id.
	Workspace, Agent, Mount string
	// Status is an encoded MountStatus; nil: it never said anything.
	Status   []byte
	Reported time.Time
}

// Tx is a transaction on one workspace. It is used by one goroutine, and not after the
// function that it was given to. Errors of the database are returned as they are; the
// transaction is then lost. Get methods return nil without an error for what is not there.
type Tx interface {
	// Workspace is the row, which is written back at the end if it changed.
	Workspace() *Workspace

	Node(ctx context.Context, id uint64) (*Node, error)
	// Nodes returns those of ids that are there, with their contents if inline.
	Nodes(ctx context.Context, ids []uint64) (map[uint64]*Node, error)
	Entry(ctx context.Context, parent uint64, name []byte) (*Entry, error)
	// EntriesOf are the names of nodes.
	EntriesOf(ctx context.Context, ids []uint64) ([]Entry, error)
	// List returns at most limit entries of a directory after a name, in the order of
	// their bytes, with their nodes. It returns fewer if their contents are long.
	List(ctx context.Context, parent uint64, after []byte, limit int) ([]Listed, error)
	HasEntries(ctx context.Context, parent uint64) (bool, error)

	PutNodes(ctx context.Context, nodes []*Node) error
	DeleteNodes(ctx context.Context, ids []uint64) error
	PutEntries(ctx context.Context, entries []Entry) error
	DeleteEntries(ctx context.Context, entries []Entry) error

	Version(ctx context.Context, node, version uint64) (*Version, error)
	// Versions are a file's versions, the newest first.
	Versions(ctx context.Context, node uint64) ([]Version, error)
	PutVersion(ctx context.Context, v *Version, by map[Hash][]byte) error
	// DropVersions removes versions of a node, all if none are named, that no snapshot
	// needs. Its row must have been put, or deleted, before.
	DropVersions(ctx context.Context, node uint64, versions ...uint64) error
	// VersionTimes are the numbers and times of a file's versions, the oldest first.
	VersionTimes(ctx context.Context, node uint64) ([]uint64, []time.Time, error)
	// Segment is the list of chunks of a segment, 32 bytes each.
	Segment(ctx context.Context, hash Hash) ([]byte, error)
	// Chunks returns the sizes of those of hashes that the workspace holds.
	Chunks(ctx context.Context, hashes []Hash) (map[Hash]uint32, error)

	// Mount is a mount of an agent, both by id.
	Mount(ctx context.Context, agent, mount string) (*Mount, error)
	PutMount(ctx context.Context, m *Mount) error
	// CountMounts is how many mounts an agent has made.
	CountMounts(ctx context.Context, agent string) (int, error)
	// Answers is the encoded answer to the batch that operation op was in.
	Answers(ctx context.Context, agent, mount string, op uint64) ([]byte, error)
	// PutAnswers keeps the answer to operations first to last, and drops old ones.
	PutAnswers(ctx context.Context, agent, mount string, first, last uint64, answers []byte) error
	// PutBlock sets node numbers aside for an agent; OwnsNode tells whether one was.
	PutBlock(ctx context.Context, agent string, first, last uint64) error
	OwnsNode(ctx context.Context, agent string, id uint64) (bool, error)
	// CountBlocks is how many rows such numbers take, of all agents; limit if there are more.
	CountBlocks(ctx context.Context, limit int) (int, error)
	// Siblings are the Nodes and KeptRows of the organization's other workspaces, together.
	Siblings(ctx context.Context) (nodes, rows uint64, err error)
	// Redirect is where an agent's operations on node go that are based on base; 0: to
	// the node. NoBase stands for those that have no base.
	Redirect(ctx context.Context, agent string, node, base uint64) (uint64, error)
	PutRedirect(ctx context.Context, agent string, node, base, kept uint64) error
	PutConflict(ctx context.Context, c *Conflict) error
	// Conflicts are the newest conflicts first, at most limit.
	Conflicts(ctx context.Context, limit int) ([]Conflict, error)

	// PutTrashed, DeleteTrashed and Trashed speak of the trash's list; the nodes hang below
	// the node Trash. ListTrashed lists what lies after an id, the newest first, if path is not nil
	// only what was there; id 0 begins.
	PutTrashed(ctx context.Context, t *Trashed) error
	DeleteTrashed(ctx context.Context, id uint64) error
	Trashed(ctx context.Context, id uint64) (*Trashed, error)
	ListTrashed(ctx context.Context, before uint64, path []byte, limit int) ([]Trashed, error)
	// Subtree counts what is below a directory, each node once.
	Subtree(ctx context.Context, id uint64) (nodes, files, stored uint64, err error)
	// Linked are the nodes below a directory that have several names.
	Linked(ctx context.Context, id uint64) ([]uint64, error)

	// MarkPurging takes an entry off the trash's list, and Purging are those that were.
	MarkPurging(ctx context.Context, id uint64) error
	Purging(ctx context.Context, limit int) ([]Trashed, error)
	// ExpiredTrash are entries that were removed before a time, the oldest first.
	ExpiredTrash(ctx context.Context, before time.Time, limit int) ([]Trashed, error)

	PutSnapshot(ctx context.Context, s *Snapshot) error
	DeleteSnapshot(ctx context.Context, id string) error
	// Snapshots are all, the newest first.
	Snapshots(ctx context.Context) ([]Snapshot, error)
	// EntriesAt are entries that were there after the change seq and are not now, or have
	// been written again; EntriesSince those that were written after it. Neither are of the trash.
	EntriesAt(ctx context.Context, seq uint64) ([]Entry, error)
	EntriesSince(ctx context.Context, seq uint64) ([]Entry, error)
	// NodesAt are nodes, as they were after the change seq, that have changed since.
	NodesAt(ctx context.Context, seq uint64) (map[uint64]*Node, error)
	// DropHistory removes at most limit rows that no snapshot needs, with the versions of
	// nodes that are gone, and returns how many.
	DropHistory(ctx context.Context, limit int) (int, error)
	// DropChanges removes changes before seq from the log, at most limit.
	DropChanges(ctx context.Context, before uint64, limit int) (int, error)

	PutChanges(ctx context.Context, changes []Change) error
	Changes(ctx context.Context, after uint64, limit int) ([]Change, error)
}

// Object is a chunk in the object store.
type Object struct {
	Hash Hash
	Key  string
	Size uint32
	// Generation is that of the organization's key which sealed it.
	Generation int64
}

// ErrKeyReplaced is wrapped by errors about objects that are sealed with a key which is gone: they are to be sealed
// with the newest.
var ErrKeyReplaced = errors.New("the key was replaced")
