package kernel

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/postern-dev/postern/agentd/kernel/internal/shim"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// suspendAgain is how long an idle kernel that could not be suspended is let be.
const suspendAgain = 10 * time.Minute

// suspendIdle suspends a kernel that nobody used.
func (m *Manager) suspendIdle(k *posternv1.Kernel, after time.Duration) {
	if m.suspend == nil || time.Since(m.refused[k.Id]) < suspendAgain {
		return
	}
	if err := m.suspend(m.ctx, k); err != nil {
		if m.refused == nil {
			m.refused = map[string]time.Time{}
		}
		m.refused[k.Id] = time.Now()
		m.logger.Warn("idle kernel not suspended: it goes on", "kernel", k.Id, "err", err)
		return
	}
	delete(m.refused, k.Id)
	m.logger.Info("idle kernel suspended", "kernel", k.Id, "after", after)
	if m.gone != nil {
		m.gone(k, fmt.Sprintf("nobody used it for %s", after))
	}
}

// tend looks after a kernel's shim until the kernel is stopped or agentd ends: one that
// died is started again, and adopts the kernel.
func (m *Manager) tend(k *kernel) {
	ctx, cancel := context.WithCancel(m.ctx)
	k.cancel = cancel
	if m.cfg.SQL != nil {
		m.wg.Go(func() { m.serveSQL(ctx, k) })
	}
	m.wg.Go(func() {
		defer close(k.tended)
		defer cancel()
		pause := time.Duration(0)
		for ctx.Err() == nil {
			err := k.agent.Watch(ctx, func(now *posternv1.Kernel) {
				pause = 0
				m.mu.Lock()
				idle := k.last == nil || k.last.State != now.State
				k.last, k.lost = now, ""
				m.mu.Unlock()
				if idle {
					m.wake()
				}
			})
			if ctx.Err() != nil {
				return
			}
			m.mu.Lock()
			stopping, process := k.stopping, k.process
			k.process = nil
			k.lost = "its shim is being replaced"
			m.mu.Unlock()
			if stopping {
				if process != nil {
					_, _ = process.Wait()
				}
				return
			}
			if !errors.Is(err, shim.ErrNoShim) || process != nil {
				m.logger.Warn("a kernel's shim ended, starting another", "kernel", k.spec.ID, "err", err)
				m.cfg.Metrics.shims.Inc()
			}
			if process != nil {
				_ = process.Kill() // one that does not answer gives way; its kernel stays
				_, _ = process.Wait()
			}
			timer := time.NewTimer(pause)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return
			}
			pause = min(max(2*pause, 100*time.Millisecond), maxPause)
			if err := m.spawn(ctx, k); err != nil && ctx.Err() == nil {
				m.logger.Error("a kernel's shim cannot be started", "kernel", k.spec.ID, "dir", k.dir, "err", err)
				m.mu.Lock()
				k.lost = "its shim cannot be started: " + err.Error()
				m.mu.Unlock()
			}
		}
	})
}

// keep fills the pool and ends idle kernels.
func (m *Manager) keep() {
	tick := time.NewTicker(idlePause)
	defer tick.Stop()
	failures := map[string]time.Time{}
	for {
		m.fill(failures)
		select {
		case <-m.ctx.Done():
			return
		case <-m.refill:
		case <-tick.C:
			m.endIdle(time.Now())
		}
	}
}

// fill starts what the pool lacks and ends what it has too much, one at a time.
func (m *Manager) fill(failures map[string]time.Time) {
	m.mu.Lock()
	s := m.settings
	m.mu.Unlock()
	var wanted []spec
	if s.Enabled && s.Warm > 0 {
		found, _ := findSpecs(s.SpecDirs)
		for _, sp := range found {
			if s.Offered == nil || s.Offered(sp.name) {
				wanted = append(wanted, sp)
			}
		}
	}
	have := map[string]int{}
	m.mu.Lock()
	var surplus []*kernel
	m.pool = slices.DeleteFunc(m.pool, func(k *kernel) bool {
		good := slices.ContainsFunc(wanted, func(sp spec) bool { return sp.name == k.spec.Name }) && have[k.spec.Name] < s.Warm
		good = good && (k.last == nil || k.last.State != posternv1.KernelState_KERNEL_STATE_DEAD)
		if good {
			have[k.spec.Name]++
		} else {
			surplus = append(surplus, k)
			failures[k.spec.Name] = time.Now()
		}
		return !good
	})
	m.mu.Unlock()
	for _, k := range surplus {
		ctx, cancel := context.WithTimeout(m.ctx, stopTime)
		if err := m.end(ctx, k); err != nil && m.ctx.Err() == nil {
			m.logger.Error("waiting kernel not ended", "dir", k.dir, "err", err)
		}
		cancel()
	}
	for _, sp := range wanted {
		for have[sp.name] < s.Warm && m.ctx.Err() == nil && time.Since(failures[sp.name]) > maxPause {
			m.mu.Lock()
			uid, ok := m.uidLocked(s)
			m.mu.Unlock()
			if !ok {
				return
			}
			slot := jupyter.NewID()
			k := m.newKernel(filepath.Join(m.cfg.Dir, slot), m.build(s, sp, uid, slot, nil, nil))
			err := m.launch(m.ctx, k, k.spec)
			close(k.ready)
			if err != nil {
				if m.ctx.Err() == nil {
					m.logger.Warn("no kernel could be started to wait", "spec", sp.name, "err", err)
				}
				failures[sp.name] = time.Now()
				m.forget(k)
				break
			}
			m.mu.Lock()
			m.pool = append(m.pool, k)
			m.mu.Unlock()
			have[sp.name]++
		}
	}
}

// endIdle stops kernels that nobody used for longer than the policy keeps them.
func (m *Manager) endIdle(now time.Time) {
	m.mu.Lock()
	after, suspend := m.settings.IdleAfter, m.settings.IdleSuspend
	m.mu.Unlock()
	if after == 0 {
		return
	}
	for _, k := range m.List() {
		quiet := k.State == posternv1.KernelState_KERNEL_STATE_IDLE || k.State == posternv1.KernelState_KERNEL_STATE_DEAD
		if !quiet || k.Connections > 0 || now.Sub(k.LastActivity.AsTime()) < after {
			continue
		}
		// It may have been used since its shim told last.
		current, err := m.Get(m.ctx, k.Id)
		if err != nil || current.State != k.State || current.Connections > 0 || now.Sub(current.LastActivity.AsTime()) < after {
			continue
		}
		if suspend {
			if current.State == posternv1.KernelState_KERNEL_STATE_IDLE {
				m.suspendIdle(current, after)
			}
			continue
		}
		m.logger.Info("idle kernel stopped", "kernel", k.Id, "after", after)
		if err := m.Stop(m.ctx, k.Id); err != nil {
			m.logger.Error("idle kernel not stopped", "kernel", k.Id, "err", err)
			continue
		}
		if m.stopped != nil {
			m.stopped(current, fmt.Sprintf("nobody used it for %s", after))
		}
	}
}
