package shim

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// lookPause is between two looks of a shim at its own directory.
	lookPause = 2 * time.Second
	// maxAlone is how long a kernel of the pool, which nobody has yet, goes on while no
	// agentd watches it. The next agentd would end it, too.
	maxAlone = time.Minute
	// abandonedTime bounds the end of a kernel that nobody can reach any more.
	abandonedTime = 2 * killTime
)

// errSocketLost ends a shim whose socket was taken away: the next one adopts the kernel.
var errSocketLost = errors.New("the shim's socket was removed or replaced: the next shim makes a new one")

// place is a kernel's directory, which nobody may take away unnoticed.
type place struct {
	dir *os.File
	// dev and ino are the socket's.
	dev, ino uint64
}

// openPlace notes the directory and the socket that was just made in it. It is found again
// under another name. The caller closes it.
func openPlace(dir string) (*place, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(int(d.Fd()), socketFile, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		_ = d.Close()
		return nil, &os.PathError{Op: "stat", Path: socketFile, Err: err}
	}
	return &place{d, st.Dev, st.Ino}, nil
}

// look reports whether the directory, or its spec.json, without which it is none of a
// kernel's, has been deleted, and whether the socket in it is still ours. A file system
// that gives no answer says neither.
func (p *place) look() (deleted, ours bool) {
	var st unix.Stat_t
	if err := unix.Fstat(int(p.dir.Fd()), &st); err != nil {
		return false, true
	}
	if st.Nlink == 0 {
		return true, false
	}
	if err := unix.Fstatat(int(p.dir.Fd()), specFile, &st, unix.AT_SYMLINK_NOFOLLOW); errors.Is(err, unix.ENOENT) {
		return true, false
	}
	err := unix.Fstatat(int(p.dir.Fd()), socketFile, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return false, !errors.Is(err, unix.ENOENT)
	}
	return false, st.Dev == p.dev && st.Ino == p.ino
}

// alone reports for how long no agentd has watched.
func (s *Shim) alone(now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watchers > 0 {
		return 0
	}
	return now.Sub(s.watched)
}

// watchedBy counts an agentd that watches; the caller calls left.
func (s *Shim) watchedBy() (left func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watchers++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.watchers--
		s.watched = time.Now()
	}
}

// abandoned is why this kernel is of no use to anybody at this moment; empty: it is.
func (s *Shim) abandoned(deleted bool, now time.Time) string {
	s.mu.Lock()
	pooled := s.spec.ID == ""
	s.mu.Unlock()
	switch {
	case deleted:
		return "its directory was deleted"
	case pooled && s.alone(now) > maxAlone:
		return "it waited to be used, and its agentd has gone"
	}
	return ""
}

// keepPlace looks after the directory until ctx ends: it ends the kernel, and with it the
// shim, when nobody can use it any more, seen twice in a row. errSocketLost is what Serve
// is to end with.
func (s *Shim) keepPlace(ctx context.Context, p *place) error {
	tick := time.NewTicker(lookPause)
	defer tick.Stop()
	before, lost := false, false
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		deleted, ours := p.look()
		why := s.abandoned(deleted, time.Now())
		switch {
		case why != "" && before:
			s.logger.Warn("ending a kernel that nobody can use any more", "reason", why)
			stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), abandonedTime)
			err := s.Stop(stop)
			cancel()
			if err == nil {
				return nil
			}
			s.logger.Error("kernel not ended, trying again", "err", err)
		case why == "" && !ours && lost:
			return errSocketLost
		}
		before, lost = why != "", !ours
	}
}
