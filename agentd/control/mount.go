package control

import (
	"time"

	"github.com/postern-dev/postern/proto"
)

// The steps of a mount on the host. The command itself mounts and unmounts: it runs where
// its user wants to see the directory, agentd perhaps in a mount namespace of its own.
const (
	// MountAttach: the policy lets it, and mountd has a mount ready for the directory.
	MountAttach = "attach"
	// MountSettle: everything written is at the control plane, or an error says what is not.
	MountSettle = "settle"
	// MountDetach: the directory is unmounted.
	MountDetach = "detach"
)

// Mount asks for one step.
type Mount struct {
	Step string `json:"step"`
	// Dir is clean, absolute and without symbolic links.
	Dir       string `json:"dir"`
	Workspace string `json:"workspace,omitempty"`
	ReadOnly  bool   `json:"read_only,omitempty"`
	// Forced: unsent writes did not hinder it; for the audit log.
	Forced bool `json:"forced,omitempty"`
}

// MountAnswer says what came of it; Error is one line, empty if it is done.
type MountAnswer struct {
	// Sockets is the directory where mountd hands out the mount.
	Sockets  string     `json:"sockets,omitempty"`
	ReadOnly bool       `json:"read_only,omitempty"`
	Code     proto.Code `json:"code,omitempty"`
	Error    string     `json:"error,omitempty"`
}

// Attachment is a workspace that is open on this host.
type Attachment struct {
	Workspace string `json:"workspace"`
	ReadOnly  bool   `json:"read_only"`
	// Mounts are the directories of the host and the kernels ("kernel ID") that have it.
	Mounts []string `json:"mounts"`
	// What the control plane has not got.
	UnsentChanges int       `json:"unsent_changes"`
	UnsentBytes   int64     `json:"unsent_bytes"`
	OldestUnsent  time.Time `json:"oldest_unsent,omitzero"`
	Conflicts     int       `json:"conflicts"`
	CacheBytes    int64     `json:"cache_bytes"`
	// UnsentPaths are at most 1000 of what is not sent, the oldest first.
	UnsentPaths []string `json:"unsent_paths,omitempty"`
	// ConflictCopies are at most 100, the newest last; Conflicts counts refused changes, too.
	ConflictCopies []ConflictCopy `json:"conflict_copies,omitempty"`
	// Connected: changes elsewhere are heard of.
	Connected bool   `json:"connected"`
	LastError string `json:"last_error,omitempty"`
	// Bucket: it is one of attachments.buckets, no workspace; Hidden counts the keys that
	// were met and cannot be files.
	Bucket bool  `json:"bucket,omitempty"`
	Hidden int64 `json:"hidden,omitempty"`
}

// ConflictCopy is what was changed here and elsewhere: KeptAs has what was made here.
type ConflictCopy struct {
	Path   string    `json:"path"`
	KeptAs string    `json:"kept_as"`
	Time   time.Time `json:"time"`
}

// Attachments is the state of mounts.
type Attachments struct {
	Enabled bool `json:"enabled"`
	// PID is mountd's; 0: it does not answer, Error says why.
	PID        int          `json:"pid,omitempty"`
	Software   string       `json:"software,omitempty"`
	Error      string       `json:"error,omitempty"`
	Workspaces []Attachment `json:"workspaces"`
}
