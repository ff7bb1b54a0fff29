package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/proto"
)

// HelperArg is the hidden command of agentd that is the helper.
const HelperArg = "criu-helper"

// DefaultTimeout bounds a call whose context has no deadline of its own.
const DefaultTimeout = 2 * time.Minute

// Places are where CRIU is looked for, in order, when the configuration names none; the
// last resort is PATH.
var Places = []string{"/opt/criu/bin/criu", "/opt/criu/sbin/criu", "/usr/local/sbin/criu", "/usr/sbin/criu"}

// Find returns the path of the CRIU to use: configured, if that is not empty, else the
// first of Places that is an executable file, else the one in PATH. The error is one
// line with what to do.
func Find(configured string) (string, error) {
	if configured != "" {
		if err := executable(configured); err != nil {
			return "", proto.Errorf(proto.CodeUnavailable, "kernels.checkpoints.criu: %v: name the path of CRIU's program, or leave it out", err)
		}
		return configured, nil
	}
	for _, p := range Places {
		if executable(p) == nil {
			return p, nil
		}
	}
	if p, err := exec.LookPath("criu"); err == nil {
		return filepath.Abs(p)
	}
	return "", proto.Errorf(proto.CodeUnavailable, "CRIU is not installed on this host: install CRIU 4.2 or newer (packaging/dev/criu.sh does it on Debian), or name it in kernels.checkpoints.criu")
}

func executable(path string) error {
	st, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case !st.Mode().IsRegular() || st.Mode().Perm()&0o111 == 0:
		return fmt.Errorf("%s is no program", path)
	case !filepath.IsAbs(path):
		return fmt.Errorf("%s is no absolute path", path)
	}
	return nil
}

// Driver runs CRIU. The zero value is not usable: Path and Self are needed.
type Driver struct {
	// Path is CRIU's program, see Find.
	Path string
	// Self is the program that answers to HelperArg; agentd gives /proc/self/exe.
	Self string
	// TestOnlyPreload is a library that is loaded into CRIU: tests on machines without
	// CAP_SYS_RESOURCE need one. The product has no way to set it; see preload.go.
	TestOnlyPreload string
}

// Dump says what to dump and where to.
type Dump struct {
	// PID is the host's process id of the tree's root, a pid namespace's init.
	PID int
	// Images is the directory for the images; it must exist and be empty.
	Images string
	// LeaveRunning lets the tree go on; otherwise it is gone when Dump returns nil, and
	// runs on when it returns an error.
	LeaveRunning bool
	// Stop leaves the tree there, stopped by SIGSTOP, until Continue or its end.
	Stop bool
	// Copies are made while the tree stands still: its files as its memory knows them.
	Copies []CopyDir
	// External are CRIU's --external options: mnt[/path/inside]:key.
	External []string
	// NetNS is the path of the tree's network namespace, which CRIU joins: then it is its
	// own, and not in the images. Empty: it is the caller's.
	NetNS string
	// Verbose writes CRIU's log in full (its level 4), which costs some time while the
	// tree is frozen; otherwise warnings and errors alone.
	Verbose bool
}

// Restore says what to restore and how.
type Restore struct {
	// Images is the image directory.
	Images string
	// Root is the directory that becomes the tree's root while its mounts are made; it
	// must be a mount point of its own with private propagation.
	Root string
	// External are CRIU's --external options: mnt[key]:/path/outside.
	External []string
	// Inherit are files that CRIU takes for external resources, by key. They stay the
	// caller's.
	Inherit map[string]*os.File
	// Cgroups are cgroup.procs files that CRIU's process is written into before it
	// starts, so that the tree is born in these groups.
	Cgroups []string
	// NetNS is the path of the network namespace that CRIU joins and the tree is born in;
	// empty: the caller's.
	NetNS string
	// Lazy leaves out memory that can come later: CRIU asks for it at a socket in Images,
	// see package lazy.
	Lazy bool
	// Verbose as in Dump.
	Verbose bool
}

// DumpStats is what CRIU counted.
type DumpStats struct {
	Freezing, Frozen, MemoryDump, MemoryWrite time.Duration
	PagesScanned, PagesWritten                uint64
	// Copying is what the copies took of the standstill, which Frozen does not count.
	Copying time.Duration
	// Took is the whole call as the caller sees it.
	Took time.Duration
}

// Restored is a tree that runs.
type Restored struct {
	// PID is the host's process id of the tree's root.
	PID int
	// Forking and Restoring are CRIU's own times; Took is the whole call.
	Forking, Restoring, Took time.Duration
}

// Subreaper makes the calling process the parent of trees that it restores.
func Subreaper() error { return unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }

// Dump dumps a tree. On an error the tree runs on, thawed: an *Error says what CRIU
// reported, a context's error that the time was over.
func (d *Driver) Dump(ctx context.Context, o Dump) (DumpStats, error) {
	began, before := time.Now(), stopped(o.PID)
	reply, err := d.call(ctx, request{Op: opDump, PID: o.PID, Images: o.Images, LeaveRunning: o.LeaveRunning, Stop: o.Stop, Copies: o.Copies, External: o.External, NetNS: o.NetNS, Verbose: o.Verbose}, nil)
	if err != nil {
		thaw(o.PID, before)
		return DumpStats{}, err
	}
	if o.Stop && !waitStopped(o.PID) {
		thaw(o.PID, before)
		return DumpStats{}, &Error{Op: opDump, Cause: CauseTimeout, Err: errors.New("a process does not stop: it waits for a file system that does not answer")}
	}
	s := reply.Stats
	s.Took = time.Since(began)
	return s, nil
}

// Restore restores a tree. On an error nothing of it is left.
func (d *Driver) Restore(ctx context.Context, o Restore) (Restored, error) {
	began := time.Now()
	reply, err := d.call(ctx, request{Op: opRestore, Images: o.Images, Root: o.Root, External: o.External, Cgroups: o.Cgroups, NetNS: o.NetNS, Lazy: o.Lazy, Verbose: o.Verbose}, o.Inherit)
	if err != nil {
		return Restored{}, err
	}
	r := reply.Restored
	r.Took = time.Since(began)
	return r, nil
}

// Continue lets a tree go on that Dump left stopped.
func Continue(pid int) {
	for p := range stopped(pid) {
		_ = unix.Kill(p, unix.SIGCONT)
	}
}

// Version asks CRIU for its version, as major*10000 + minor*100 + sublevel.
func (d *Driver) Version(ctx context.Context) (int, error) {
	reply, err := d.call(ctx, request{Op: opVersion}, nil)
	return reply.Version, err
}

// Sizes looks at files in the helper process, since a file on a FUSE mount that does not
// answer hangs whoever looks: -1 for one that is no regular file or not there. times are
// when they were changed, in nanoseconds since the epoch. The context's end ends it.
func (d *Driver) Sizes(ctx context.Context, files []Sized) (sizes, times []int64, err error) {
	reply, err := d.call(ctx, request{Op: opStat, Stat: files}, nil)
	if err == nil && (len(reply.Sizes) != len(files) || len(reply.Times) != len(files)) {
		err = errGone
	}
	return reply.Sizes, reply.Times, err
}

// VersionString writes a version as people do: 4.2.1.
func VersionString(v int) string {
	return fmt.Sprintf("%d.%d.%d", v/10000, v/100%100, v%100)
}

// Minimum is the first version that kernels can be dumped with on Linux 6.16 and later:
// older ones fail at every TCP socket there, and ipykernel always has one.
const Minimum = 40200

func (d *Driver) preload() string {
	if d.TestOnlyPreload != "" {
		return d.TestOnlyPreload
	}
	return preloadOfBuild()
}

// errGone is returned when the helper ended without an answer.
var errGone = errors.New("the CRIU helper ended without an answer")

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
