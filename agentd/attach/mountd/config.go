package mountd

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/postern-dev/postern/agentd/attach/fdkeeper"
	"github.com/postern-dev/postern/agentd/attach/fuseserver"
)

// SocketName is mountd's socket in its directory.
const SocketName = "mountd.sock"

const (
	// drainTime is how long Detach waits for what is not sent, if the caller does not say.
	drainTime = 10 * time.Second
	// beatEvery is how often the keeper is told that this process lives.
	beatEvery = 2 * time.Second
	// openingEvery is how often the keeper is told that this process is taking over.
	openingEvery = 500 * time.Millisecond
	// openTime bounds the opening of a workspace.
	openTime = fdkeeper.OpeningTime
	// closeTime bounds the end of the process once it was told to stop.
	closeTime = 8 * time.Second
)

// ErrUnsent is returned when a mount has writes that the control plane has not got.
var ErrUnsent = errors.New("writes are not yet at the control plane")

// Mount is a file system, ready to be served.
type Mount struct {
	FS      fuse.RawFileSystem
	Options fuse.MountOptions
	// DefaultPermissions: the kernel checks modes and owners.
	DefaultPermissions bool
	// SetKernel is called before the first request. inherited says that the kernel knows
	// nodes, and has handles, of a process before this one. Optional.
	SetKernel func(k *fuseserver.Conn, inherited bool)
	// SyncDeadline is how long closing and syncing a file may take; 0: like any request.
	SyncDeadline time.Duration
	// Ended is called when the superblock has gone, or was never served; optional.
	Ended func()
}

func (m Mount) end() {
	if m.Ended != nil {
		m.Ended()
	}
}

// Workspace is an open replica. It is safe for concurrent use.
type Workspace interface {
	// Mount makes a file system of it: squashed, or with POSIX owners.
	Mount(squash bool) (Mount, error)
	// Inherit is called before Mount when the kernel has handles of a process before.
	Inherit()
	// Fresh is called before the first Mount when it has none.
	Fresh() error
	Status() WorkspaceStatus
	// Unsent lists paths that have something to send, and Conflicts what was kept under another
	// name; both are bounded.
	Unsent() []string
	Conflicts() []Conflict
	// Gone tells whether somebody has removed what it keeps on this host.
	Gone() bool
	// Drain returns when all that was written before is at the control plane.
	Drain(ctx context.Context) error
	// Close keeps what is not sent on disk.
	Close() error
}

// WorkspaceStatus is what a workspace has not sent, and what it keeps.
type WorkspaceStatus struct {
	UnsentOps   int       `json:"unsent_ops"`
	UnsentBytes int64     `json:"unsent_bytes"`
	Oldest      time.Time `json:"oldest,omitzero"`
	Conflicts   int       `json:"conflicts"`
	CacheBytes  int64     `json:"cache_bytes"`
	Nodes       int       `json:"nodes"`
	// Connected: changes elsewhere are heard of.
	Connected bool   `json:"connected"`
	LastError string `json:"last_error,omitempty"`
	// Bucket: it is no workspace of the control plane but a bucket that the host reaches
	// itself. Hidden counts its keys that cannot be files, as often as they were met.
	Bucket bool  `json:"bucket,omitempty"`
	Hidden int64 `json:"hidden,omitempty"`
}

// Conflict is what was changed here and elsewhere: KeptAs has what was made here. Paths begin with
// "/" and have any bytes.
type Conflict struct {
	Path   []byte `json:"path"`
	KeptAs []byte `json:"kept_as"`
	TimeNs int64  `json:"time_ns"`
}

// Details are what a WorkspaceStatus counts.
type Details struct {
	// Unsent are paths with something to send, in order; at most 1000, and fewer if they are long.
	Unsent    [][]byte   `json:"unsent,omitempty"`
	Conflicts []Conflict `json:"conflicts,omitempty"`
	// Next is where the next answer goes on; 0: this was the last one.
	Next int `json:"next,omitempty"`
}

// Permission is what the host's configuration lets be done with a workspace.
type Permission struct {
	ReadOnly bool
}

// Config is what mountd needs.
type Config struct {
	// Dir is where sockets and state are: STATE/attach.
	Dir string
	// Open opens a workspace by name.
	Open func(ctx context.Context, name string, readOnly bool) (Workspace, error)
	// Pending are names of workspaces that may have something unsent from an earlier life.
	Pending func() []string
	// Decide holds a mount against the host's policy; an error is POLICY_DENIED.
	Decide func(workspace string) (Permission, error)
	// SpawnKeeper starts another keeper when ours has died.
	SpawnKeeper func(ctx context.Context) error
	Logger      *slog.Logger
}

// Holder is one who asked for a mount.
type Holder struct {
	Workspace string `json:"workspace"`
	// Name is "host:/absolute/dir" or "kernel:ID".
	Name     string    `json:"name"`
	ReadOnly bool      `json:"read_only"`
	Squash   bool      `json:"squash"`
	Since    time.Time `json:"since"`
}

// Status is what mountd says of itself.
type Status struct {
	PID        int               `json:"pid"`
	Software   string            `json:"software"`
	Started    time.Time         `json:"started"`
	Workspaces []MountedStatus   `json:"workspaces"`
	Holders    []Holder          `json:"holders"`
	Keeper     bool              `json:"keeper"`
	Failed     map[string]string `json:"failed,omitempty"`
}

// MountedStatus is one open workspace.
type MountedStatus struct {
	Workspace string `json:"workspace"`
	ReadOnly  bool   `json:"read_only"`
	// Mounts counts holders.
	Mounts int `json:"mounts"`
	// Requests are under way.
	Requests int `json:"requests"`
	WorkspaceStatus
}
