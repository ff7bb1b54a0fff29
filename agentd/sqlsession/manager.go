package sqlsession

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/child"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// resetWait is how long a statement waits for its owner's last session to
	// be reset before it takes another: a reset takes a millisecond or two.
	resetWait = 100 * time.Millisecond
	// warmDelay lets the statement that took the warm session go first: the
	// start of a process takes milliseconds of a core.
	warmDelay = 25 * time.Millisecond
	// killedTimeout bounds the wait for killed processes.
	killedTimeout = 2 * time.Second
	// warmRetry is the pause after a warm session failed to start.
	warmRetry = 5 * time.Second
)

// Manager runs statements in SQL sessions. Make one with New, end it with
// Close.
type Manager struct {
	config Config
	log    *slog.Logger
	parser *Parser // nil with Config.NoParser
	root   bool
	wg     sync.WaitGroup // every goroutine
	stop   chan struct{}  // closed by Close

	mu       sync.Mutex // guards what follows and the fields of sources and sessions that say so
	closed   bool
	sources  map[string]*source
	sessions map[*session]bool
	running  map[string]*run
	slots    []bool
	pinned   map[string]*pinned
	wires    map[string]*Wire // by session id
	ended    []endedSession   // at most maxEnded, oldest first
}

// source is a data source with its sessions; all fields under Manager.mu.
type source struct {
	Source
	config   confinement
	active   int // statements that have a place
	waiting  []chan struct{}
	owned    []*session // idle or resetting, oldest first
	warm     []*session
	starting int // warm ones on their way
	lastUsed time.Time
	retry    time.Time // no warm start before
	removed  bool
}

// New makes a Manager without sources.
func New(config Config) *Manager {
	m := &Manager{
		config: config.withDefaults(), root: os.Geteuid() == 0, stop: make(chan struct{}),
		sources: make(map[string]*source), sessions: make(map[*session]bool), running: make(map[string]*run),
		pinned: make(map[string]*pinned), wires: make(map[string]*Wire),
	}
	m.log = m.config.Logger
	if !m.root {
		m.log.Info("agentd does not run as root: sql sessions share its user")
	}
	m.slots = make([]bool, m.config.UIDCount)
	switch {
	case m.config.NoParser:
	case m.config.Parser != nil:
		m.parser = m.config.Parser
	default:
		m.parser = NewParser(ParserConfig{
			Executable: m.config.Executable, UID: m.config.UIDBase + m.config.UIDCount + parserUIDs, Logger: m.log, Metrics: m.config.Metrics,
		})
	}
	m.wg.Add(1)
	go m.retireSessions()
	return m
}

// SetSources replaces the data sources. Sessions of a source that is gone, or
// whose engine or DSN changed, end: at once when the source is gone, after the
// statement under way when it changed. Other changes count from the next
// statement on. The sources must be valid: see ValidateDSN.
func (m *Manager) SetSources(sources []Source) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	if m.parser != nil && slices.ContainsFunc(sources, func(s Source) bool { return s.Engine == "postgres" }) {
		m.parser.StartSoon()
	}
	old := m.sources
	m.sources = make(map[string]*source, len(sources))
	for _, s := range sources {
		s = s.withDefaults()
		kept := old[s.Name]
		// Whether its file is open for writing is decided when a process starts.
		if kept != nil && kept.Engine == s.Engine && kept.DSN == s.DSN && (s.Engine != "sqlite" || kept.ReadWrite == s.ReadWrite) {
			if !sameSource(kept.Source, s) {
				for _, p := range m.pinned {
					if p.source == kept {
						m.endSoonLocked(p, "the policy of its data source changed", "policy", false)
					}
				}
				m.drainWiresLocked(kept, false)
			}
			kept.Source = s
			m.sources[s.Name] = kept
			kept.wakeLocked()
			continue
		}
		m.sources[s.Name] = newSource(s)
	}
	for name, s := range old {
		if m.sources[name] == s {
			continue
		}
		s.removed = true
		for _, p := range m.pinned {
			if p.source == s {
				m.endSoonLocked(p, "its data source was removed or changed", "policy", false)
			}
		}
		m.drainWiresLocked(s, m.sources[name] == nil)
		for _, idle := range slices.Concat(s.owned, s.warm) {
			if idle.ready == nil { // one that is being reset ends after it
				m.endLocked(idle)
			}
		}
		s.warm = nil
		s.owned = slices.DeleteFunc(s.owned, func(x *session) bool { return x.ready == nil })
		if m.sources[name] == nil {
			for _, r := range m.running {
				if r.source == s {
					m.wg.Add(1)
					go func() {
						defer m.wg.Done()
						r.stop(frame.Draining)
					}()
				}
			}
		}
		s.wakeLocked()
	}
}

func newSource(s Source) *source {
	s = s.withDefaults()
	return &source{Source: s, config: confine(s.Engine, s.DSN)}
}

// confine says what a source's processes may reach.
func confine(engine, dsn string) confinement {
	if engine == "mysql" {
		d, err := child.ParseMySQLDSN(dsn)
		if err != nil {
			return confinement{ports: []uint16{}} // refused when it connects
		}
		c := confinement{ports: []uint16{d.Port}}
		if d.SSLRootCert != "" {
			c.readable = []string{d.SSLRootCert}
		}
		return c
	}
	if engine == "sqlite" {
		return confinement{ports: []uint16{}} // what it uses is opened for it
	}
	config, err := child.ParseDSN(dsn)
	if err != nil {
		return confinement{} // refused when it connects
	}
	c := confinement{ports: []uint16{config.Port}}
	for _, f := range config.Fallbacks {
		c.ports = append(c.ports, f.Port)
	}
	if match := rootCertPattern.FindStringSubmatch(dsn); match != nil {
		for _, path := range match[1:] {
			if path != "" {
				c.readable = append(c.readable, path)
			}
		}
	}
	return c
}

// rootCertPattern finds sslrootcert in both forms of a DSN. A path that it
// does not get right can't be read by the process, which says so.
var rootCertPattern = regexp.MustCompile(`sslrootcert\s*=\s*(?:'([^']*)'|([^\s'&]+))`)

func (s *source) confinement(executable string) confinement {
	c := s.config
	c.executable = executable
	return c
}

// place waits for one of the source's places.
func (m *Manager) place(ctx context.Context, src *source) error {
	deadline := time.NewTimer(m.config.QueueTimeout)
	defer deadline.Stop()
	m.mu.Lock()
	for src.active >= src.Concurrency && !src.removed && !m.closed {
		free := make(chan struct{})
		src.waiting = append(src.waiting, free)
		limit := src.Concurrency
		m.mu.Unlock()
		var err error
		select {
		case <-free:
		case <-deadline.C:
			err = proto.Errorf(proto.CodeOverloaded, "data source %q runs %d statements already, its limit: try again later", src.Name, limit)
		case <-ctx.Done():
			err = contextError(ctx, "while it waited for a place")
		}
		m.mu.Lock()
		if err != nil {
			src.waiting = slices.DeleteFunc(src.waiting, func(c chan struct{}) bool { return c == free })
			// A place may have been offered at the same time: pass it on.
			src.wakeLocked()
			m.mu.Unlock()
			return err
		}
	}
	defer m.mu.Unlock()
	if src.removed || m.closed {
		return proto.Errorf(proto.CodeUnavailable, "data source %q goes away: try again", src.Name)
	}
	src.active++
	src.lastUsed = time.Now()
	return nil
}

func (m *Manager) leave(src *source) {
	m.mu.Lock()
	defer m.mu.Unlock()
	src.active--
	src.wakeLocked()
}

// wakeLocked lets as many waiters look again as there are places.
func (s *source) wakeLocked() {
	n := len(s.waiting)
	if !s.removed {
		n = max(0, min(n, s.Concurrency-s.active))
	}
	for _, c := range s.waiting[:n] {
		close(c)
	}
	s.waiting = s.waiting[n:]
}

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

// Cancel cancels a statement under way, in the database too; false when there
// is none of that id. It does not wait for the end. The id of a session of
// PostgreSQL's own protocol stands for whatever that runs.
func (m *Manager) Cancel(queryID string) bool {
	m.mu.Lock()
	r := m.running[queryID]
	w, seq := m.wireOfLocked(queryID)
	found := w != nil && (seq == 0 || w.running[queryID] != nil)
	m.mu.Unlock()
	if found {
		w.cancel(seq)
		return true
	}
	if r == nil {
		return false
	}
	r.stop(frame.Cancelled)
	return true
}

// Running lists the statements under way, oldest first.
func (m *Manager) Running() []*posternv1.RunningQuery {
	m.mu.Lock()
	runs := make([]*run, 0, len(m.running))
	for _, r := range m.running {
		runs = append(runs, r)
	}
	var wired []*posternv1.RunningQuery
	for _, w := range m.wires {
		wired = slices.AppendSeq(wired, maps.Values(w.running))
	}
	m.mu.Unlock()
	slices.SortFunc(runs, func(a, b *run) int { return a.started.Compare(b.started) })
	queries := make([]*posternv1.RunningQuery, len(runs))
	for i, r := range runs {
		queries[i] = r.running()
	}
	if len(wired) > 0 {
		queries = append(queries, wired...)
		slices.SortFunc(queries, func(a, b *posternv1.RunningQuery) int { return a.Started.AsTime().Compare(b.Started.AsTime()) })
	}
	return queries
}

// ErrClosed is returned, inside an UNAVAILABLE error, after Close was called.
var ErrClosed = errors.New("sqlsession: closed")

// Close cancels what runs, ends all sessions and waits for them. When ctx ends
// first, what is left is killed; then only a Run whose writer is blocked can
// outlive Close. It may be called once.
func (m *Manager) Close(ctx context.Context) error {
	if m.parser != nil && m.config.Parser == nil {
		defer m.parser.Close()
	}
	m.mu.Lock()
	m.closed = true
	close(m.stop)
	var runs []*run
	for _, r := range m.running {
		runs = append(runs, r)
	}
	for _, p := range m.pinned {
		m.endSoonLocked(p, "agentd stopped", "policy", false)
	}
	m.drainWiresLocked(nil, true)
	for _, src := range m.sources {
		for _, s := range slices.Concat(src.owned, src.warm) {
			if s.ready == nil {
				m.endLocked(s)
			}
		}
		src.owned = slices.DeleteFunc(src.owned, func(s *session) bool { return s.ready == nil })
		src.warm = nil
		src.wakeLocked()
	}
	m.mu.Unlock()
	for _, r := range runs {
		r.stop(frame.Draining)
	}
	done := make(chan struct{})
	go func() {
		m.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	m.mu.Lock()
	for s := range m.sessions {
		s.kill()
	}
	m.mu.Unlock()
	select {
	case <-done:
	case <-time.After(killedTimeout):
	}
	return ctx.Err()
}
