package policy

import (
	"fmt"
	"strings"

	"github.com/postern-dev/postern/proto/glob"
)

// What holds for attachments where the configuration is silent, in bytes.
const (
	DefaultAttachmentCache  uint64 = 20 << 30
	DefaultAttachmentUnsent uint64 = 50 << 30
)

// Attachments is the checked policy of a host's mounts of workspaces. The zero value
// allows none.
type Attachments struct {
	// Enabled: the configuration has attachments.
	Enabled bool
	// Workspaces are patterns of the names that may be mounted; nil: all.
	Workspaces []string
	// ReadOnly are patterns of those, of which nothing may be changed here.
	ReadOnly []string
	// HostMounts are the directories below which the host itself may mount one; nil: none.
	HostMounts []string
	// Cache bounds what is kept of contents that can be fetched again, Unsent what the
	// control plane has not got yet, in bytes, each for one workspace.
	Cache, Unsent uint64
	// Binds are directories of the host that kernels may mount like workspaces. A name of
	// one stands for it and never for a workspace.
	Binds []AttachedBind
	// Buckets are object stores' that the host reaches by itself. A name of one stands for it
	// and never for a workspace.
	Buckets []AttachedBucket
}

// AttachedBucket is a bucket under the name of a workspace.
type AttachedBucket struct {
	Name string
	// ReadOnly: nothing in it may be changed from here.
	ReadOnly bool
}

// Bucket is the bucket of this name, if it is one.
func (a Attachments) Bucket(name string) (AttachedBucket, bool) {
	for _, b := range a.Buckets {
		if b.Name == name {
			return b, true
		}
	}
	return AttachedBucket{}, false
}

// AttachedBind is a directory of the host under the name of a workspace.
type AttachedBind struct {
	Name, Path string
	// ReadOnly: kernels may only read it.
	ReadOnly bool
}

// Bind is the directory of this name, if it is one.
func (a Attachments) Bind(name string) (AttachedBind, bool) {
	for _, b := range a.Binds {
		if b.Name == name {
			return b, true
		}
	}
	return AttachedBind{}, false
}

// Mount decides whether a workspace, or a directory of Binds or one of Buckets, may be mounted on this host, and whether only to be
// read. A reason, one line, refuses it.
func (a Attachments) Mount(workspace string) (readOnly bool, reason string) {
	if !a.Enabled {
		return false, "attachments are off on this host: add attachments: to agentd.yaml"
	}
	if b, ok := a.Bind(workspace); ok {
		return b.ReadOnly, ""
	}
	if b, ok := a.Bucket(workspace); ok {
		return b.ReadOnly, ""
	}
	if a.Workspaces != nil && !matchAny(a.Workspaces, workspace) {
		return false, fmt.Sprintf("workspace %.64q may not be mounted on this host: see attachments.workspaces in agentd.yaml", workspace)
	}
	return matchAny(a.ReadOnly, workspace), ""
}

// HostMount decides whether the host itself may mount something on a directory, a clean
// absolute path.
func (a Attachments) HostMount(dir string) (reason string) {
	for _, root := range a.HostMounts {
		if rest, below := strings.CutPrefix(dir, root+"/"); below && rest != "" {
			return ""
		}
	}
	if len(a.HostMounts) == 0 {
		return "this host mounts workspaces for kernels alone: name a directory in attachments.host_mounts in agentd.yaml"
	}
	return fmt.Sprintf("workspaces may only be mounted below %s on this host: see attachments.host_mounts in agentd.yaml", strings.Join(a.HostMounts, ", "))
}

func matchAny(patterns []string, name string) bool {
	for _, p := range patterns {
		if glob.Match(p, name) {
			return true
		}
	}
	return false
}
