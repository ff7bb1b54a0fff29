package workspace

import (
	"context"
	"strconv"
	"sync"
	"time"

	"github.com/postern-dev/postern/controlplane/filetree"
)

const (
	// readsEvery is how long what agents read waits to be written to the audit log, and
	// maxReads how many reads wait at most: then one is written at once.
	readsEvery = time.Second
	maxReads   = 10_000
)

// reads gathers what agents read, for the audit log: one entry for many files.
type reads struct {
	mu    sync.Mutex
	by    map[readKey]*deeds
	count int
}

type readKey struct {
	agent     Agent
	workspace string // id
	name      string
}

// noteRead notes that an agent asked for a file's content. The entry is written within a
// second or two; if it can't be written, later ones carry on trying.
func (s *Service) noteRead(ctx context.Context, a Agent, w *filetree.Workspace, id, size uint64) error {
	var path []byte
	err := s.cfg.Store.ReadFiles(ctx, a.Organization, w.ID, func(tx filetree.Tx) error {
		t := newTree(ctx, tx, zeroTime, "", "")
		n, err := t.node(id)
		if err != nil || n == nil {
			return err
		}
		path, err = t.path(n)
		return err
	})
	if err != nil {
		return err
	}
	s.reads.mu.Lock()
	key := readKey{a, w.ID, w.Name}
	d := s.reads.by[key]
	if d == nil {
		d = &deeds{}
		s.reads.by[key] = d
	}
	if path == nil {
		path = []byte("node " + strconv.FormatUint(id, 10))
	}
	d.add("read", path, size)
	s.reads.count++
	full := s.reads.count >= maxReads
	s.reads.mu.Unlock()
	if full {
		return s.flushReads(ctx)
	}
	return nil
}

// flushReads writes what was gathered.
func (s *Service) flushReads(ctx context.Context) error {
	s.reads.mu.Lock()
	by := s.reads.by
	s.reads.by, s.reads.count = map[readKey]*deeds{}, 0
	s.reads.mu.Unlock()
	for key, d := range by {
		if err := s.note(ctx, key.agent, &filetree.Workspace{Name: key.name}, "file.read", d); err != nil {
			s.reads.mu.Lock()
			for key, d := range by {
				if have := s.reads.by[key]; have != nil {
					have.merge(d)
				} else {
					s.reads.by[key] = d
				}
				s.reads.count += d.ops
			}
			s.reads.mu.Unlock()
			return err
		}
		delete(by, key)
	}
	return nil
}

func (d *deeds) merge(o *deeds) {
	d.ops, d.bytes, d.more = d.ops+o.ops, d.bytes+o.bytes, d.more+o.more
	if len(d.lines)+len(o.lines) <= maxDeeds {
		d.lines = append(d.lines, o.lines...)
	} else {
		d.more += o.ops
	}
}

// gather writes what agents read, until the service closes.
func (s *Service) gather() {
	defer close(s.gathered)
	ticker := time.NewTicker(readsEvery)
	defer ticker.Stop()
	for {
		select {
		case <-s.ctx.Done():
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			if err := s.flushReads(ctx); err != nil {
				s.cfg.Logger.Error("reads of agents not written to the audit log", "err", err)
			}
			return
		case <-ticker.C:
			if err := s.flushReads(s.ctx); err != nil && s.ctx.Err() == nil {
				s.cfg.Logger.Warn("reads of agents not written to the audit log yet", "err", err)
			}
		}
	}
}
