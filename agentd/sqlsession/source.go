package sqlsession

import (
	"context"
	"regexp"
	"slices"
	"time"

	"github.com/postern-dev/postern/agentd/confine"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/child"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/proto"
)

// source is a data source with its sessions; all fields under Manager.mu.
type source struct {
	Source
	config   confine.Confinement
	active   int // statements that have a place
	waiting  []chan struct{}
	owned    []*session // idle or resetting, oldest first
	warm     []*session
	starting int // warm ones on their way
	lastUsed time.Time
	retry    time.Time // no warm start before
	removed  bool
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
	return &source{Source: s, config: reach(s.Engine, s.DSN)}
}

// reach says what a source's processes may reach.
func reach(engine, dsn string) confine.Confinement {
	if engine == "mysql" {
		d, err := child.ParseMySQLDSN(dsn)
		if err != nil {
			return confine.Confinement{Ports: []uint16{}} // refused when it connects
		}
		c := confine.Confinement{Ports: []uint16{d.Port}}
		if d.SSLRootCert != "" {
			c.Readable = []string{d.SSLRootCert}
		}
		return c
	}
	if engine == "sqlite" {
		return confine.Confinement{Ports: []uint16{}} // what it uses is opened for it
	}
	config, err := child.ParseDSN(dsn)
	if err != nil {
		return confine.Confinement{} // refused when it connects
	}
	c := confine.Confinement{Ports: []uint16{config.Port}}
	for _, f := range config.Fallbacks {
		c.Ports = append(c.Ports, f.Port)
	}
	if match := rootCertPattern.FindStringSubmatch(dsn); match != nil {
		for _, path := range match[1:] {
			if path != "" {
				c.Readable = append(c.Readable, path)
			}
		}
	}
	return c
}

// rootCertPattern finds sslrootcert in both forms of a DSN. A path that it
// does not get right can't be read by the process, which says so.
var rootCertPattern = regexp.MustCompile(`sslrootcert\s*=\s*(?:'([^']*)'|([^\s'&]+))`)

func (s *source) confinement(executable string) confine.Confinement {
	c := s.config
	c.Executable = executable
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
