package fdkeeper

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// namespace is a mount namespace with an empty root, of one thread of this process. The
// mounts in it keep superblocks alive and can be cloned (a detached one cannot, before
// Linux 6.15); nobody else sees them, and they vanish with the process.
type namespace struct {
	jobs chan job
	done chan struct{}
}

type job struct {
	do     func() error
	answer chan error
}

var errBusy = errors.New("the mount namespace does not answer: a mount in it waits for its server")

// newNamespace needs CAP_SYS_ADMIN. dir is an existing directory, on which nothing stays.
func newNamespace(dir string) (*namespace, error) {
	n := &namespace{jobs: make(chan job), done: make(chan struct{})}
	ready := make(chan error, 1)
	go n.run(dir, ready)
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("mount namespace of the keeper: %w", err)
	}
	return n, nil
}

func (n *namespace) run(dir string, ready chan<- error) {
	defer close(n.done)
	runtime.LockOSThread() // for good: the thread ends with the goroutine
	err := enter(dir)
	ready <- err
	if err != nil {
		return
	}
	for j := range n.jobs {
		j.answer <- j.do()
	}
}

func enter(dir string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700,size=64k"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	if err := unix.Chdir(dir); err != nil {
		return err
	}
	// The mounts of the host must not be held here: somebody may want to unmount them.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the host's mounts: %w", err)
	}
	return unix.Chdir("/")
}

// do runs f in the namespace, one at a time. It gives up after callTime with errBusy;
// f may happen later then.
func (n *namespace) do(f func() error) error {
	j := job{do: f, answer: make(chan error, 1)}
	late := time.NewTimer(callTime)
	defer late.Stop()
	select {
	case n.jobs <- j:
	case <-late.C:
		return errBusy
	}
	select {
	case err := <-j.answer:
		return err
	case <-late.C:
		return errBusy
	}
}

// close ends the namespace, if nothing in it hangs.
func (n *namespace) close() {
	close(n.jobs)
	select {
	case <-n.done:
	case <-time.After(callTime):
	}
}

// attach moves a detached tree into the namespace.
func (n *namespace) attach(name string, tree *os.File) error {
	return n.do(func() error {
		if err := os.Mkdir("/"+name, 0o700); err != nil {
			return err
		}
		if err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, "/"+name, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return errors.Join(fmt.Errorf("keep the mount: %w", err), os.Remove("/"+name))
		}
		return nil
	})
}

// clone makes a detached copy of a tree, to be moved anywhere.
func (n *namespace) clone(name string, readOnly bool) (*os.File, error) {
	var out *os.File
	err := n.do(func() error {
		fd, err := unix.OpenTree(unix.AT_FDCWD, "/"+name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return fmt.Errorf("copy the mount: %w", err)
		}
		f := os.NewFile(uintptr(fd), "tree")
		if readOnly {
			attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
			if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
				return errors.Join(fmt.Errorf("make the mount read-only: %w", err), f.Close())
			}
		}
		out = f
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// detach takes a tree out again. It may wait for the server, if it was the last mount.
func (n *namespace) detach(name string) error {
	return n.do(func() error {
		if err := unix.Unmount("/"+name, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount: %w", err)
		}
		return os.Remove("/" + name)
	})
}
