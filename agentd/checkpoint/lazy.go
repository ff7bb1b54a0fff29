package checkpoint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/checkpoint/internal/criu"
	"github.com/postern-dev/postern/agentd/checkpoint/internal/lazy"
)

// Filling is memory of a restored tree that is being brought in. Err is valid when Done is
// closed: nil says that all is there, or that nobody needs it any more; another error that
// the tree was ended, and why. Close lets go of it, and it goes on. The caller must not
// dump the tree before Done, and must call Close.
type Filling = interface {
	Done() <-chan struct{}
	Err() error
	Close()
}

// sharedLazily is how much memory other processes than the largest may have, in bytes, for a
// tree to be restored lazily: what a fork shares with its parent each would get for itself.
const sharedLazily = 64 << 20

// RestoreLazily is RestoreTree for a tree that has more than over bytes of memory which can
// come later: it runs before they are there, and filling, which is nil otherwise, brings
// them. mark is a path for a file that says how far that is, for AwaitFilled. eager is why
// it was restored as by RestoreTree instead, in one line; empty: it was not, or it has
// no more than over bytes.
func (d *Driver) RestoreLazily(ctx context.Context, path string, tree []byte, images string, over int64, mark string) (pid int, filling Filling, eager string, err error) {
	var t Tree
	if err := json.Unmarshal(tree, &t); err != nil {
		return 0, nil, "", fmt.Errorf("restore: %w", err)
	}
	if err := Subreaper(); err != nil {
		return 0, nil, "", fmt.Errorf("restore: become a subreaper: %w", err)
	}
	at := d.At(path)
	plan, err := lazy.Look(images)
	switch {
	case err != nil:
		eager = oneLine(err.Error())
	case plan.Bytes <= over:
	case plan.Bytes-plan.Largest > sharedLazily:
		eager = "its processes may share memory, of which each would get a copy"
	default:
		if err := lazy.Available(); err != nil {
			eager = "no userfaultfd here: " + err.Error()
			break
		}
		pid, f, why, err := at.lazily(ctx, t, images, mark)
		if err != nil || why == "" {
			return pid, f, "", err
		}
		eager = why
	}
	pid, _, err = at.Restore(ctx, t, images)
	return pid, nil, eager, err
}

// lazily restores lazily. why is why not, when nothing of the tree is left and all can begin
// anew.
func (d *Driver) lazily(ctx context.Context, t Tree, images, mark string) (pid int, f Filling, why string, err error) {
	r, err := lazy.Begin(ctx, "/proc/self/exe", HelperArg, images, mark)
	if err != nil {
		return 0, nil, oneLine(err.Error()), context.Cause(ctx)
	}
	if pid, _, err = d.restore(ctx, t, images, true); err == nil {
		if err = r.Restored(ctx, pid); err == nil {
			return pid, r, "", nil
		}
		err = errors.Join(err, end(pid))
	}
	r.Abort()
	if rerr := os.Remove(mark); rerr != nil && err == nil {
		err = rerr
	}
	return 0, nil, oneLine(err.Error()), context.Cause(ctx)
}

// end ends a tree that was restored and waits for it.
func end(pid int) error {
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		return err
	}
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// AwaitFilled waits until all memory of a tree came that an earlier process restored with
// RestoreLazily; busy is whether it is at it, without wait. An error but the context's says
// that some is missing: the tree must be ended. Without a mark nothing is.
func (d *Driver) AwaitFilled(ctx context.Context, mark string, wait bool) (busy bool, err error) {
	if busy, err = lazy.Busy(mark); busy && wait {
		return false, lazy.Await(ctx, mark)
	}
	return busy, err
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// HelperMain is the process that drives CRIU, or brings memory in; it returns the exit code.
func HelperMain() int {
	if len(os.Args) == 4 && os.Args[2] == lazy.Arg {
		return lazy.Main(filepath.Clean(os.Args[3]))
	}
	return criu.HelperMain()
}
