package checkpoint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/checkpoint/internal/criu"
	"github.com/postern-dev/postern/proto"
)

// Tree is what CRIU has to know of a kernel's processes and of what is outside of them.
// It is plain data.
type Tree struct {
	// PID is init's process id on the host; zero before a restore.
	PID int `json:"pid,omitempty"`
	// Root is a directory that is a private mount of its own; for a restore.
	Root string `json:"root,omitempty"`
	// Mounts are all mounts from outside.
	Mounts []Mount `json:"externals,omitempty"`
	// Cgroups are the cgroup.procs files of the groups that the kernel is in.
	Cgroups []string `json:"cgroups,omitempty"`
	// NetNSPath is the network namespace, which CRIU joins; empty: it is the caller's.
	// NetNSKey names it in images of before CRIU joined it, NetNSInode is its inode.
	NetNSKey   string `json:"netns_key,omitempty"`
	NetNSInode uint64 `json:"netns_inode,omitempty"`
	NetNSPath  string `json:"netns_path,omitempty"`
}

// Mount is a mount from outside, which images know by its key alone.
type Mount struct {
	Key     string `json:"key"`
	Inside  string `json:"inside"`
	Outside string `json:"outside"`
}

// After says what becomes of a tree that was dumped.
type After int

// What becomes of a tree.
const (
	// GoOn: it goes on.
	GoOn After = iota
	// Stay: it is there, stopped, until Continue or its end.
	Stay
	// End: it is gone.
	End
)

// CopyDir is a directory that is copied as it is while the tree stands still: first
// beside the running tree, then what changed. To must be empty. Max bounds the bytes of
// its files; zero means 16 GiB.
type CopyDir = criu.CopyDir

// Figures are what a dump or a restore took. Standstill is how long the tree did not run
// because of it.
type Figures struct {
	Standstill, Took time.Duration
	Pages            uint64
}

// Driver runs CRIU for trees. It is safe for concurrent use; calls for one tree must
// not overlap.
type Driver struct {
	configured string
	testOnly   string
	versions   *versions
}

// versions remembers the version of the program that was asked last.
type versions struct {
	mu      sync.Mutex
	of      unix.Stat_t
	version string
}

// NewDriver returns a driver. path is CRIU's by the configuration, or empty; whether it
// is there is looked at by each call, so that it can be installed later.
func NewDriver(path string) *Driver { return &Driver{configured: path, versions: &versions{}} }

// TestOnlyPreload loads a library into CRIU, for tests on machines without
// CAP_SYS_RESOURCE; see package criutest. It returns d.
func (d *Driver) TestOnlyPreload(path string) *Driver {
	d.testOnly = path
	return d
}

func (d *Driver) driver() (*criu.Driver, error) {
	path, err := criu.Find(d.configured)
	if err != nil {
		return nil, err
	}
	return &criu.Driver{Path: path, Self: "/proc/self/exe", TestOnlyPreload: d.testOnly}, nil
}

// Dump writes the tree's images into the directory images, which must be empty, and
// makes the copies. On an error the tree runs on, and the error is one line with a code.
// A context without deadline has one of two minutes.
func (d *Driver) Dump(ctx context.Context, t Tree, images string, after After, copies ...CopyDir) (Figures, error) {
	c, err := d.driver()
	if err != nil {
		return Figures{}, err
	}
	if lack := c.Missing(); lack != "" {
		return Figures{}, proto.Errorf(proto.CodeUnavailable, "checkpoint: %s: see agentd doctor", lack)
	}
	o := criu.Dump{PID: t.PID, Images: images, LeaveRunning: after == GoOn, Stop: after == Stay, Copies: copies}
	for _, m := range t.Mounts {
		o.External = append(o.External, fmt.Sprintf("mnt[%s]:%s", m.Inside, m.Key))
	}
	o.NetNS = t.NetNSPath
	s, err := c.Dump(ctx, o)
	if err != nil {
		return Figures{}, public(err)
	}
	return Figures{Standstill: s.Freezing + s.Frozen + s.Copying, Took: s.Took, Pages: s.PagesWritten}, nil
}

// Continue lets a tree go on that Dump left stopped.
func (d *Driver) Continue(pid int) { criu.Continue(pid) }

// Restore brings the tree of an image directory back and returns init's process id on
// the host; init is a child of the nearest subreaper above this process. On an error
// nothing of it is left.
func (d *Driver) Restore(ctx context.Context, t Tree, images string) (int, Figures, error) {
	return d.restore(ctx, t, images, false)
}

func (d *Driver) restore(ctx context.Context, t Tree, images string, lazy bool) (int, Figures, error) {
	c, err := d.driver()
	if err != nil {
		return 0, Figures{}, err
	}
	o := criu.Restore{Images: images, Root: t.Root, Cgroups: t.Cgroups, Lazy: lazy}
	for _, m := range t.Mounts {
		o.External = append(o.External, fmt.Sprintf("mnt[%s]:%s", m.Key, m.Outside))
	}
	if t.NetNSKey != "" {
		ns, err := os.Open(t.NetNSPath)
		if err != nil {
			return 0, Figures{}, fmt.Errorf("restore: the kernel's network namespace: %w", err)
		}
		defer ns.Close() //nolint:errcheck // a namespace
		// Images that were made with the namespace as something external ask for it by key.
		o.Inherit, o.NetNS = map[string]*os.File{t.NetNSKey: ns}, t.NetNSPath
	}
	r, err := c.Restore(ctx, o)
	if err != nil {
		return 0, Figures{}, public(err)
	}
	return r.PID, Figures{Standstill: r.Took, Took: r.Took}, nil
}

// Version is CRIU's, as 4.2.1. It is asked for once, until the program changes.
func (d *Driver) Version(ctx context.Context) (string, error) {
	c, err := d.driver()
	if err != nil {
		return "", err
	}
	var st unix.Stat_t
	if err := unix.Stat(c.Path, &st); err != nil {
		return "", fmt.Errorf("CRIU: %w", err)
	}
	m := d.versions
	m.mu.Lock()
	known := m.version
	same := known != "" && st.Dev == m.of.Dev && st.Ino == m.of.Ino && st.Size == m.of.Size && st.Mtim == m.of.Mtim && st.Ctim == m.of.Ctim
	m.mu.Unlock()
	if same {
		return known, nil
	}
	v, err := c.Version(ctx)
	if err != nil {
		return "", public(err)
	}
	m.mu.Lock()
	m.of, m.version = st, criu.VersionString(v)
	m.mu.Unlock()
	return criu.VersionString(v), nil
}

// public gives CRIU's errors a code.
func public(err error) error {
	var e *criu.Error
	if errors.As(err, &e) {
		return e.Public()
	}
	return err
}

// Subreaper makes this process the parent of the trees that it restores, so that it
// learns how they end.
func Subreaper() error { return criu.Subreaper() }

// At returns the driver with another path of CRIU's; empty means where it is found.
func (d *Driver) At(path string) *Driver {
	other := *d
	other.configured = path
	return &other
}

// DumpTree is Dump for a shim, which knows the tree as JSON (a Tree) and has one
// directory to copy, at most max bytes. path is CRIU's by the configuration.
func (d *Driver) DumpTree(ctx context.Context, path string, tree []byte, images string, stay bool, from, to string, max int64) (standstill time.Duration, err error) {
	var t Tree
	if err := json.Unmarshal(tree, &t); err != nil {
		return 0, fmt.Errorf("dump: %w", err)
	}
	after := GoOn
	if stay {
		after = Stay
	}
	f, err := d.At(path).Dump(ctx, t, images, after, CopyDir{From: from, To: to, Max: max})
	return f.Standstill, err
}

// RestoreTree is Restore for a shim, which becomes the tree's parent.
func (d *Driver) RestoreTree(ctx context.Context, path string, tree []byte, images string) (pid int, err error) {
	var t Tree
	if err := json.Unmarshal(tree, &t); err != nil {
		return 0, fmt.Errorf("restore: %w", err)
	}
	if err := Subreaper(); err != nil {
		return 0, fmt.Errorf("restore: become a subreaper: %w", err)
	}
	pid, _, err = d.At(path).Restore(ctx, t, images)
	return pid, err
}
