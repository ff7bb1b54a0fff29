package checkpoint

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/proto"
)

// spool is where images are for the time of one operation: in memory if there is room,
// since whoever writes to a disk in the midst of a dump may be made to wait for it.
type spool struct {
	memory, disk string // memory is empty if it can't be used
	kept         *kept
	left         []string // of earlier operations, not removed yet
	log          *slog.Logger
}

// spareMemory is what must remain of the memory, and spareSpace of a file system, in bytes.
const (
	spareMemory = 512 << 20
	spareSpace  = 64 << 20
)

func openSpool(memory, disk string, log *slog.Logger) (spool, error) {
	s := spool{memory: memory, disk: disk, log: log, kept: newKept(log)}
	if err := ownDir(disk); err != nil {
		return s, fmt.Errorf("checkpoint spool: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(memory), &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		s.memory = ""
	} else if err := ownDir(memory); err != nil {
		log.Warn("checkpoints: images can't pass through memory and take the disk", "err", err)
		s.memory = ""
	}
	for _, dir := range []string{s.memory, s.disk} {
		if dir == "" {
			continue
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			return s, fmt.Errorf("checkpoint spool: %w", err)
		}
		for _, e := range entries { // of operations that a crash ended
			path := filepath.Join(dir, e.Name())
			if err := os.RemoveAll(path); err != nil {
				s.left = append(s.left, path) // CRIU may be at work there still, for a shim
			}
		}
	}
	return s, nil
}

// tidyPause is between two tries to remove what is left of earlier operations.
const tidyPause = 2 * time.Second

// tidy removes what openSpool could not, until that is done or the context ends.
func (s spool) tidy(ctx context.Context) {
	for told := false; len(s.left) > 0; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(tidyPause):
		}
		s.left = slices.DeleteFunc(s.left, func(path string) bool {
			err := os.RemoveAll(path)
			if err != nil && !told {
				s.log.Warn("checkpoints: left-over images not removed yet", "path", path, "err", err)
				told = true
			}
			return err == nil
		})
	}
}

// ownDir makes a directory for this user alone. One that is there must be so already:
// /dev/shm is open to everybody.
func ownDir(path string) error {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if st := info.Sys().(*syscall.Stat_t); !info.IsDir() || st.Uid != uint32(os.Geteuid()) || info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s is not a directory of this user's alone: remove it", path)
	}
	return nil
}

// room makes a directory for need bytes of images. done removes it.
func (s spool) room(need int64) (dir string, done func(), err error) {
	base := s.disk
	if s.memory != "" && (free(s.memory) <= need+spareSpace || available() <= need+spareMemory) {
		s.kept.clear()
	}
	if s.memory != "" && free(s.memory) > need+spareSpace && available() > need+spareMemory {
		base = s.memory
	} else if have := free(s.disk); have < need+spareSpace {
		return "", nil, proto.Errorf(proto.CodeStorageFull, "checkpoint: its images need %d MiB, and %s has %d MiB: make space", need>>20, s.disk, have>>20)
	}
	if dir, err = os.MkdirTemp(base, "op-"); err != nil {
		return "", nil, fmt.Errorf("checkpoint spool: %w", err)
	}
	return dir, func() {
		if err := os.RemoveAll(dir); err != nil {
			s.log.Error("checkpoints: images not removed", "path", dir, "err", err)
		}
	}, nil
}

// holds reports whether a directory that room made is in memory.
func (s spool) holds(dir string) bool { return s.memory != "" && filepath.Dir(dir) == s.memory }

func free(dir string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 0
	}
	return int64(st.Bavail) * int64(st.Bsize)
}

// available is the memory that could be had without swapping; 0 if unknown.
func available() int64 {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0
	}
	defer f.Close() //nolint:errcheck // it is only read
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if v, ok := strings.CutPrefix(lines.Text(), "MemAvailable:"); ok {
			n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
			return n << 10
		}
	}
	return 0
}

// resident is what the processes of a tree hold in memory, in bytes: an upper bound of
// their images.
func resident(tree []int) int64 {
	var sum int64
	for _, pid := range tree {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/statm")
		if err != nil {
			continue
		}
		if f := strings.Fields(string(b)); len(f) > 2 {
			all, _ := strconv.ParseInt(f[1], 10, 64)
			sum += all * int64(os.Getpagesize())
		}
	}
	return sum
}
