package kernel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/agentd/kernel/internal/shim"
)

// stopMark is a file in the directory of a kernel that is being stopped: agentd
// finishes that at its next start.
const stopMark = "stopping"

// forget ends a kernel whose start failed.
func (m *Manager) forget(k *kernel) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(m.ctx), stopTime)
	defer cancel()
	if err := m.end(ctx, k); err != nil {
		m.logger.Error("remains of a kernel that did not start", "dir", k.dir, "err", err)
	}
	m.mu.Lock()
	delete(m.kernels, k.spec.ID)
	m.mu.Unlock()
}

// Stop ends a kernel and removes what it had on the host.
func (m *Manager) Stop(ctx context.Context, id string) error {
	k, err := m.find(ctx, id)
	if err != nil {
		return err
	}
	// What was begun is finished, whoever hangs up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
	defer cancel()
	if err := m.end(ctx, k); err != nil {
		return err
	}
	m.mu.Lock()
	if m.kernels[id] == k {
		delete(m.kernels, id)
	}
	m.mu.Unlock()
	return nil
}

// end ends a kernel, its shim and its directory.
func (m *Manager) end(ctx context.Context, k *kernel) error {
	m.mu.Lock()
	again := k.stopping
	k.stopping = true
	m.mu.Unlock()
	if _, err := os.Stat(k.dir); errors.Is(err, fs.ErrNotExist) {
		k.cancel()
		m.release(k)
		return nil
	}
	undo := func(err error) error {
		if !again {
			m.mu.Lock()
			k.stopping = false
			m.mu.Unlock()
		}
		return err
	}
	mark, err := os.OpenFile(filepath.Join(k.dir, stopMark), os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		err = mark.Close()
	}
	if err != nil {
		m.logger.Warn("a stop not marked", "dir", k.dir, "err", err) // a full disk does not stop it
	}
	err = k.agent.Stop(ctx)
	if err != nil && !errors.Is(err, shim.ErrNoShim) && !errors.Is(err, io.EOF) {
		return undo(fmt.Errorf("stop kernel: %w", err))
	}
	k.cancel()
	<-k.tended
	m.mu.Lock()
	process := k.process
	k.process = nil
	m.mu.Unlock()
	if process != nil {
		stop := context.AfterFunc(ctx, func() { _ = process.Kill() })
		_, _ = process.Wait()
		stop()
	}
	if err := sandbox.Cleanup(ctx, k.spec.Sandbox); err != nil {
		return undo(fmt.Errorf("clean up after the kernel: %w", err))
	}
	if err := m.remove(k.dir); err != nil {
		return undo(err)
	}
	m.release(k)
	return nil
}

func (m *Manager) release(k *kernel) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.uids, k.spec.Sandbox.UID)
}

// remove removes a kernel's directory, never through a mount.
func (m *Manager) remove(dir string) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && (f[4] == dir || strings.HasPrefix(f[4], dir+"/")) {
			return fmt.Errorf("something is still mounted at %s: unmount it", f[4])
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove the kernel's files: %w", err)
	}
	return nil
}
