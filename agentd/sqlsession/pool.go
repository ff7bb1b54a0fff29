package sqlsession

import (
	"context"
	"os"
	"slices"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
)

// resetWait is how long a statement waits for its owner's last session to be reset
// before it takes another: a reset takes a millisecond or two. Tests that count
// processes lengthen it.
var resetWait = 100 * time.Millisecond

// acquire returns a session for a statement of owner: the owner's own, a warm
// one, or a new one. fresh tells that it is new.
func (m *Manager) acquire(ctx context.Context, src *source, owner string) (s *session, fresh bool, err error) {
	waited := time.NewTimer(resetWait)
	defer waited.Stop()
	m.mu.Lock()
	for owner != "" {
		var resetting *session
		for i, candidate := range slices.Backward(src.owned) {
			if candidate.owner != owner || candidate.login.expiring() {
				continue
			}
			if candidate.ready != nil {
				resetting = candidate
				continue
			}
			src.owned = slices.Delete(src.owned, i, i+1)
			m.mu.Unlock()
			return candidate, false, nil
		}
		if resetting == nil {
			break
		}
		ready := resetting.ready
		m.mu.Unlock()
		expired := false
		select {
		case <-ready:
		case <-waited.C:
			expired = true
		case <-ctx.Done():
			return nil, false, contextError(ctx, "while it waited for a session")
		}
		m.mu.Lock()
		if expired {
			break
		}
	}
	for len(src.warm) > 0 && src.warm[len(src.warm)-1].login.expiring() {
		m.endLocked(src.warm[len(src.warm)-1])
		src.warm = src.warm[:len(src.warm)-1]
	}
	if n := len(src.warm); n > 0 {
		s = src.warm[n-1]
		src.warm = src.warm[:n-1]
		s.owner, s.used = owner, true
		m.topUpLocked(src)
		m.mu.Unlock()
		return s, false, nil
	}
	m.evictLocked(src)
	m.mu.Unlock()
	if s, err = m.start(ctx, src); err != nil {
		return nil, false, err
	}
	m.mu.Lock()
	s.owner, s.used = owner, true
	m.topUpLocked(src)
	m.mu.Unlock()
	return s, true, nil
}

// evictLocked ends the session that has been idle longest when a source has
// as many as it may have: its concurrency and the warm ones.
func (m *Manager) evictLocked(src *source) {
	n := 0
	for s := range m.sessions {
		if s.source == src {
			n++
		}
	}
	if n < src.Concurrency+m.config.Warm {
		return
	}
	for i, s := range src.owned {
		if s.ready == nil {
			src.owned = slices.Delete(src.owned, i, i+1)
			m.endLocked(s)
			return
		}
	}
}

// topUpLocked starts warm sessions as needed.
func (m *Manager) topUpLocked(src *source) {
	for !m.closed && !src.removed && len(src.warm)+src.starting < m.config.Warm && time.Now().After(src.retry) {
		src.starting++
		m.wg.Add(1)
		go func() {
			defer m.wg.Done()
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			select {
			case <-m.stop:
			case <-time.After(warmDelay):
			}
			stopped := make(chan struct{})
			defer close(stopped)
			m.wg.Add(1)
			go func() {
				defer m.wg.Done()
				select {
				case <-m.stop:
					cancel()
				case <-stopped:
				}
			}()
			s, err := m.start(ctx, src)
			m.mu.Lock()
			defer m.mu.Unlock()
			src.starting--
			if err != nil {
				// The next statement that needs a session says what is wrong.
				src.retry = time.Now().Add(warmRetry)
				m.log.Debug("no warm sql session", "source", src.Name, "err", err)
				return
			}
			if m.closed || src.removed {
				m.endLocked(s)
				return
			}
			s.idleSince = time.Now()
			src.warm = append(src.warm, s)
		}()
	}
}

// recycle waits for a session's reset and keeps it for its owner, or ends it.
func (m *Manager) recycle(s *session) {
	m.mu.Lock()
	s.ready = make(chan struct{})
	src := s.source
	src.owned = append(src.owned, s)
	m.wg.Add(1)
	m.mu.Unlock()
	go func() {
		defer m.wg.Done()
		_ = s.conn.SetReadDeadline(time.Now().Add(resetTimeout))
		t, err := s.frames.Next()
		ok := err == nil && t == frame.Idle && s.conn.SetReadDeadline(time.Time{}) == nil
		m.mu.Lock()
		defer m.mu.Unlock()
		close(s.ready)
		s.ready = nil
		s.idleSince = time.Now()
		if !ok || s.owner == "" || m.closed || src.removed {
			src.owned = slices.DeleteFunc(src.owned, func(x *session) bool { return x == s })
			m.endLocked(s)
		}
	}()
}

// retireSessions ends sessions that nobody has used for long.
func (m *Manager) retireSessions() {
	defer m.wg.Done()
	tick := time.NewTicker(max(m.config.IdleTimeout/4, 10*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-m.stop:
			return
		case now := <-tick.C:
			m.mu.Lock()
			for _, src := range m.sources {
				src.owned = slices.DeleteFunc(src.owned, func(s *session) bool {
					old := s.ready == nil && (now.Sub(s.idleSince) > m.config.IdleTimeout || s.login.expiring())
					if old {
						m.endLocked(s)
					}
					return old
				})
				src.warm = slices.DeleteFunc(src.warm, func(s *session) bool {
					if s.login.expiring() {
						m.endLocked(s)
					}
					return s.login.expiring()
				})
				if now.Sub(src.lastUsed) > 10*m.config.IdleTimeout {
					for _, s := range src.warm {
						m.endLocked(s)
					}
					src.warm = nil
				}
			}
			m.mu.Unlock()
		}
	}
}

// endLocked ends a session that nobody uses any more; the caller has taken it
// out of its source's lists.
func (m *Manager) endLocked(s *session) {
	m.wg.Add(1)
	go func() {
		defer m.wg.Done()
		s.end()
	}()
}

// adopt counts a new process among ours.
func (m *Manager) adopt(s *session) {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-s.exited:
	default:
		m.sessions[s] = true
		m.config.Metrics.sessions.Set(float64(len(m.sessions)))
	}
}

// gone forgets a process that has ended.
func (m *Manager) gone(s *session) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.sessions, s)
	m.config.Metrics.sessions.Set(float64(len(m.sessions)))
	m.slots[s.slot] = false
	is := func(x *session) bool { return x == s }
	if slices.ContainsFunc(s.source.warm, is) || s.ready == nil && slices.ContainsFunc(s.source.owned, is) {
		s.source.warm = slices.DeleteFunc(s.source.warm, is)
		s.source.owned = slices.DeleteFunc(s.source.owned, is)
		_ = s.conn.Close()
	}
}

// introducer is the descriptor over which a new process finds the parser.
func (m *Manager) introducer() (*os.File, error) {
	if m.parser == nil {
		return os.Open(os.DevNull)
	}
	return m.parser.introducer()
}

func (m *Manager) takeSlot() (int, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := slices.Index(m.slots, false)
	if i < 0 {
		return 0, false
	}
	m.slots[i] = true
	return i, true
}

func (m *Manager) freeSlot(i int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.slots[i] = false
}
