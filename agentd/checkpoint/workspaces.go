package checkpoint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/checkpoint/internal/criu"
	"github.com/postern-dev/postern/proto"
)

// A kernel that sees workspaces moves without them: they are at the control plane, and the
// other host mounts them. What is written on this host must be there before, and the other
// host must see the same versions of the files that are open.

const (
	// versionsFile goes along with a kernel that has workspaces: fileTimes, as JSON.
	versionsFile = "versions"
	// maxVersions bounds versionsFile, in bytes, and maxVersioned its files.
	maxVersions, maxVersioned = 4 << 20, 10_000
	// settleTime is how long a move waits for what was written to be sent: once while the
	// kernel runs, and once when it is suspended.
	settleTime = 30 * time.Second
	// heardTime is how long the host that a kernel came to waits to hear of the files'
	// versions.
	heardTime = 30 * time.Second
)

// fileTimes say when files were changed last, in nanoseconds since the epoch, by their paths
// in the kernel. That time goes along with a file through the control plane.
type fileTimes map[string]int64

func (e *Engine) settle(ctx context.Context, id string, n MoveNeeds) error {
	if len(n.Mounts) == 0 {
		return nil
	}
	return e.cfg.Moves.Settle(ctx, id, settleTime)
}

// settled is settle for a kernel that is suspended, and returns the versions of files that
// it had open, as JSON; nil if it has no workspaces.
func (e *Engine) settled(ctx context.Context, id string, n MoveNeeds, open []string) ([]byte, error) {
	if len(n.Mounts) == 0 {
		return nil, nil
	}
	if err := e.settle(ctx, id, n); err != nil {
		return nil, err
	}
	want := make([]criu.Sized, len(open))
	for i, inside := range open {
		want[i].Path = outside(inside, n.Work)
	}
	d, err := e.cfg.Driver.driver()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, statTime)
	defer cancel()
	_, times, err := d.Sizes(ctx, want)
	if ctx.Err() != nil {
		return nil, proto.Errorf(proto.CodeTimeout, "a workspace of kernel %s does not answer: look whether its mount is well", id)
	}
	if err != nil {
		return nil, public(err)
	}
	v := fileTimes{}
	for i, inside := range open {
		if times[i] != 0 {
			v[inside] = times[i]
		}
	}
	return json.Marshal(v)
}

// openOn are the files below directories of the kernel's that its processes have open, by
// their paths in the kernel; at most maxVersioned. One that is opened later is missed: of
// that the size is compared alone.
func openOn(tree []int, work map[string]string) []string {
	found := map[string]bool{}
	dirs := slices.Collect(maps.Keys(work))
	for _, pid := range tree {
		fds := fmt.Sprintf("/proc/%d/fd", pid)
		entries, err := os.ReadDir(fds)
		if err != nil {
			continue // it ended
		}
		for _, entry := range entries {
			// A link is read without touching the file.
			path, err := os.Readlink(filepath.Join(fds, entry.Name()))
			if err == nil && under(path, dirs) && len(found) < maxVersioned {
				found[path] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// outside is where the host has a file that a kernel sees at inside.
func outside(inside string, work map[string]string) string {
	for dir, host := range work {
		if rest, ok := strings.CutPrefix(inside, dir+"/"); ok {
			return filepath.Join(host, rest)
		}
	}
	return ""
}

// takeVersions reads versionsFile in the directory of what came, and removes it: nothing of
// the kernel's has that name.
func takeVersions(dir string) (fileTimes, error) {
	path := filepath.Join(dir, versionsFile)
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if info.Size() > maxVersions {
		return nil, proto.Errorf(proto.CodeInvalid, "the other host sent versions of more files than a kernel has open")
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var v fileTimes
	if err := json.Unmarshal(b, &v); err != nil {
		return nil, proto.Errorf(proto.CodeInvalid, "the other host sent versions of files that can't be read")
	}
	return v, os.Remove(path)
}

// awaitFiles waits until the workspaces of a kernel that came are here as it left them, as
// far as it has files open; heardTime at most.
func (e *Engine) awaitFiles(ctx context.Context, in intent, c Checkpoint, dir string, v fileTimes) error {
	k, err := e.look(ctx, in.Organization, in.Kernel)
	if err != nil {
		return err
	}
	until := time.Now().Add(heardTime)
	for {
		err := e.unchangedSince(ctx, k, c, dir, v)
		if err == nil || proto.CodeOf(err) != proto.CodeInvalid || time.Now().After(until) {
			return err
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
