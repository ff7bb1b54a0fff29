package fdkeeper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// claim makes a process the server. It ends the one before: with SIGTERM, so that it
// answers what it has read, and after endTime with SIGKILL.
func (k *Keeper) claim(ctx context.Context, conn *net.UnixConn, pid int) (*session, error) {
	k.claiming.Lock()
	defer k.claiming.Unlock()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("follow process %d: %w", pid, err)
	}
	s := &session{conn: conn, pid: pid, pidfd: os.NewFile(uintptr(fd), "pidfd"), ended: make(chan struct{}), claimed: time.Now(), heard: time.Now()}
	k.mu.Lock()
	before := k.server
	k.mu.Unlock()
	if before != nil && before.pid != pid { // else it only talks on a new conversation
		k.cfg.Logger.Info("server of mounts replaced", "pid", before.pid, "by", pid)
		if err := before.end(ctx); err != nil {
			return nil, errors.Join(err, s.pidfd.Close())
		}
	}
	k.mu.Lock()
	k.server, k.lastClaim = s, pid
	k.mu.Unlock()
	k.wg.Go(func() { k.follow(ctx, s) })
	return s, nil
}

// end ends a server's process and waits until it has.
func (s *session) end(ctx context.Context) error {
	for _, step := range []struct {
		signal unix.Signal
		wait   time.Duration
	}{{unix.SIGTERM, endTime}, {unix.SIGKILL, callTime}} {
		if err := s.signal(step.signal); err != nil && !errors.Is(err, unix.ESRCH) {
			select {
			case <-s.ended:
				return nil
			default:
				return fmt.Errorf("end the server before: %w", err)
			}
		}
		select {
		case <-s.ended:
			return nil
		case <-time.After(step.wait):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return fmt.Errorf("the server before, process %d, does not end", s.pid)
}

// signal sends a signal to the process, and never to another one that has its number.
func (s *session) signal(number unix.Signal) error {
	raw, err := s.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), number, nil, 0) })
	return errors.Join(err, serr)
}

// follow notices the end of a server's process, whoever started it.
func (k *Keeper) follow(ctx context.Context, s *session) {
	gone := waitPidfd(ctx, s.pidfd)
	k.mu.Lock()
	if gone && k.server != nil && k.server.pid == s.pid {
		k.server = nil
		for _, e := range k.entries {
			e.served = false
		}
	}
	k.mu.Unlock()
	close(s.ended)
	_ = s.conn.Close()
	if gone {
		k.wake()
	}
}

// waitPidfd waits for a process's end, or for ctx's: false. A pidfd becomes readable when
// the process has ended, with all its threads.
func waitPidfd(ctx context.Context, pidfd *os.File) bool {
	defer pidfd.Close() //nolint:errcheck // nothing was written
	raw, err := pidfd.SyscallConn()
	ended := false
	for err == nil && !ended && ctx.Err() == nil {
		err = raw.Control(func(fd uintptr) {
			n, perr := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
			ended = n > 0 && perr == nil
		})
	}
	return ended
}

// supervise sees to it that there is a server, and starts another when it is asked to.
func (k *Keeper) supervise(ctx context.Context) {
	k.await(ctx)
	var pause time.Duration
	for ctx.Err() == nil {
		k.mu.Lock()
		needed := k.server == nil || k.renew
		k.renew = false
		command := k.command
		k.mu.Unlock()
		if !needed {
			select {
			case <-k.poke:
			case <-ctx.Done():
			}
			continue
		}
		if pause > 0 {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return
			}
		}
		// At once after a server that came as far as to claim; slower and slower after one
		// that did not.
		if k.start(ctx, command) {
			pause = 0
		} else {
			pause = min(max(2*pause, 25*time.Millisecond), time.Second)
		}
	}
}

// await lets a server that lives without a keeper claim.
func (k *Keeper) await(ctx context.Context) {
	path := filepath.Join(k.cfg.Dir, serverLock)
	for until := time.Now().Add(adoptTime); time.Now().Before(until) && ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
		lock, err := lockFile(path)
		if lock != nil {
			err = lock.Close()
		}
		k.mu.Lock()
		found := k.server != nil
		k.mu.Unlock()
		if found || err != nil || lock != nil {
			return
		}
	}
}

// start runs a server until it ends, or until the next look at whether one is needed, and
// tells whether it had claimed.
func (k *Keeper) start(ctx context.Context, command []string) (claimed bool) {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = "/", k.cfg.Env, os.Stdout, os.Stderr
	cmd.SysProcAttr = newSession()
	if err := cmd.Start(); err != nil {
		k.cfg.Logger.Error("server of mounts not started", "err", err)
		return false
	}
	ended := make(chan error, 1)
	k.wg.Go(func() { ended <- cmd.Wait() })
	late := time.NewTimer(startTime + endTime)
	defer late.Stop()
	defer func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		claimed = k.lastClaim == cmd.Process.Pid
	}()
	for {
		select {
		case err := <-ended:
			k.mu.Lock()
			idle := len(k.entries) == 0
			other := k.server != nil && k.server.pid != cmd.Process.Pid
			k.mu.Unlock()
			if err == nil && idle && !other {
				k.cfg.Logger.Info("server of mounts has ended, nothing is kept")
				k.cancel()
				return claimed
			}
			k.cfg.Logger.Warn("server of mounts has ended", "pid", cmd.Process.Pid, "err", err)
			return claimed
		case <-late.C:
			k.mu.Lock()
			serves := k.lastClaim == cmd.Process.Pid
			k.mu.Unlock()
			if !serves {
				k.cfg.Logger.Error("server of mounts killed: it did not claim in time", "pid", cmd.Process.Pid)
				_ = cmd.Process.Kill()
			}
		case <-k.poke:
			k.mu.Lock()
			renew := k.renew
			k.mu.Unlock()
			if renew {
				return claimed // the next one ends this one
			}
		case <-ctx.Done():
			_ = cmd.Process.Signal(unix.SIGTERM)
			select {
			case <-ended:
			case <-time.After(endTime):
				_ = cmd.Process.Kill()
				<-ended
			}
			return claimed
		}
	}
}

// watch aborts connections that are waited for in vain, and kills a server that hangs.
func (k *Keeper) watch(ctx context.Context) {
	ticker := time.NewTicker(watchEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		for _, e := range k.unserved() {
			k.cfg.Logger.Error("mount aborted: somebody waited, and nobody serves it", "connection", e.name)
			if err := k.cfg.Control.Abort(e.minor); err != nil {
				k.cfg.Logger.Error("mount not aborted", "connection", e.name, "err", err)
				continue
			}
			if err := k.drop(e.name); err != nil {
				k.cfg.Logger.Warn("aborted mount not let go", "connection", e.name, "err", err)
			}
		}
		if s := k.silent(); s != nil {
			k.cfg.Logger.Error("server of mounts killed: it hangs", "pid", s.pid)
			_ = s.signal(unix.SIGKILL)
		}
	}
}

// unserved are the connections for which somebody has waited too long.
func (k *Keeper) unserved() []*entry {
	now := time.Now()
	k.mu.Lock()
	defer k.mu.Unlock()
	// One that is slow is not in vain: it has a large journal to read, or the host is busy.
	s := k.server
	opening := s != nil && s.opening && now.Sub(s.heard) < k.cfg.Patience && now.Sub(s.claimed) < OpeningTime
	var out []*entry
	for _, e := range k.entries {
		if e.served {
			continue
		}
		if opening {
			e.waited = time.Time{}
			continue
		}
		if n, err := k.cfg.Control.Waiting(e.minor); err != nil || n == 0 {
			e.waited = time.Time{}
			continue
		}
		switch {
		case e.waited.IsZero():
			e.waited = now
		case now.Sub(e.waited) > k.cfg.Patience:
			out = append(out, e)
		}
	}
	return out
}

// silent is the server, if it hangs while somebody waits.
func (k *Keeper) silent() *session {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.server
	if s == nil || s.busy || time.Since(s.heard) < k.cfg.Silence {
		return nil
	}
	for _, e := range k.entries {
		if n, err := k.cfg.Control.Waiting(e.minor); err == nil && n > 0 {
			return s
		}
	}
	return nil
}
