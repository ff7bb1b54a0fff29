package sqlsession

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/postern-dev/postern/agentd/cgroup"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
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

	lacking sync.Once // what the host lacks to hold sessions to their limits is logged once

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

// Close cancels what runs, ends all sessions and waits for them; sessions that stay
// go on without us where Config.Hold is set. When ctx ends
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
		switch {
		case p.process == nil || !p.process.holds.Load() || p.ending != "":
			m.endSoonLocked(p, "agentd stopped", "policy", false)
		case p.busy == "":
			m.detachLocked(p)
		default:
			p.detach = true
		}
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
		cgroup.Tidy(cgroup.SQL)
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
