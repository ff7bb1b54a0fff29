package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// The disk limit. Quotas of the file system would be exact, but few hosts have them
// switched on where the state directory is. So what a kernel has on disk is counted,
// every second or as seldom as keeps the counting below a twentieth of a CPU, and
// a kernel that is over its limit is ended. In that time it can write as much
// more as the disk takes; no single file grows beyond the limit (RLIMIT_FSIZE).

// Bounds of the count.
const (
	diskInterval = time.Second
	diskShare    = 20
	// maxEntries is how many files and directories a kernel may have: counting more
	// takes seconds.
	maxEntries = 1_000_000
	// maxDepth is how deep directories may be nested. Each level takes a descriptor
	// while it is counted.
	maxDepth = 200
)

// errTooMany is returned by diskUse for what can't be counted.
var errTooMany = errors.New("too many files")

// watchDisk ends the kernel when it is over its disk limit, until the context ends.
func (s *Sandbox) watchDisk(ctx context.Context) {
	limit := s.host.spec.Limits.Disk
	wait := diskInterval
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.done:
			return
		case <-time.After(wait):
		}
		began := time.Now()
		used, err := s.host.spec.diskUse(ctx)
		wait = max(diskInterval, diskShare*time.Since(began))
		over := ""
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, errTooMany):
			over = fmt.Sprintf("killed: more than %d files, or directories deeper than %d, in its home and its temporary directory", maxEntries, maxDepth)
		case err != nil:
			continue // it changes while it is counted
		case used > limit:
			over = "killed: over its disk limit of " + Bytes(limit)
		default:
			continue
		}
		s.mu.Lock()
		s.over = over
		s.mu.Unlock()
		_ = s.signalInit()
		return
	}
}

// DiskUse counts what the kernel has on disk, in bytes.
func (s *Sandbox) DiskUse(ctx context.Context) (int64, error) { return s.host.spec.diskUse(ctx) }

func (s *Spec) diskUse(ctx context.Context) (int64, error) {
	c := counter{ctx: ctx}
	if st, err := os.Lstat(s.LogFile); err == nil {
		c.bytes += st.Size()
	}
	for _, dir := range []string{s.RunDir, filepath.Join(s.PrivateDir, "home"), filepath.Join(s.PrivateDir, "tmp")} {
		fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return 0, err
		}
		if err := c.directory(fd, 0); err != nil {
			return 0, err
		}
	}
	return c.bytes, nil
}

type counter struct {
	ctx     context.Context
	bytes   int64
	entries int
}

// directory counts what is below a directory, which it closes. It follows no link
// and leaves the file system never: the kernel can change names meanwhile, but what
// an opened directory is stays.
func (c *counter) directory(fd, depth int) error {
	f := os.NewFile(uintptr(fd), "directory")
	defer f.Close() //nolint:errcheck // it is only read
	if depth > maxDepth {
		return errTooMany
	}
	for {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		entries, err := f.Readdirnames(1024)
		for _, name := range entries {
			if c.entries++; c.entries > maxEntries {
				return errTooMany
			}
			var st unix.Stat_t
			if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				continue // gone
			}
			c.bytes += st.Blocks * 512
			if st.Mode&unix.S_IFMT != unix.S_IFDIR {
				continue
			}
			sub, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
			if err != nil {
				continue
			}
			if err := c.directory(sub, depth+1); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
