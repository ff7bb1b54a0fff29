package kernel

import (
	"slices"
	"strings"
	"sync"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/textmask"
)

const (
	// notKept stands for code when an agent's patterns can't be read by this version.
	notKept = "(not kept)"
	// maxMaskers bounds the sets of patterns that are kept compiled; one takes some
	// tens of KiB.
	maxMaskers = 64
)

// maskers are compiled patterns of agents, by the patterns. Safe for concurrent use.
type maskers struct {
	mu  sync.Mutex
	all map[string]*textmask.Set // nil: they can't be compiled
}

// code is the text of a cell as it may be stored: a cell may hold what any of the
// agent's data sources masks in texts, so the patterns of all of them apply.
func (m *maskers) code(agent *posternv1.Agent, text string) string {
	var patterns []string
	for _, s := range agent.GetSources() {
		patterns = append(patterns, s.TextPatterns...)
	}
	if len(patterns) == 0 || text == "" {
		return text
	}
	slices.Sort(patterns)
	patterns = slices.Compact(patterns)
	key := strings.Join(patterns, "\x00")
	m.mu.Lock()
	set, known := m.all[key]
	if !known {
		var err error
		if set, err = compile(patterns); err != nil {
			set = nil
		}
		if m.all == nil || len(m.all) >= maxMaskers {
			m.all = make(map[string]*textmask.Set)
		}
		m.all[key] = set
	}
	m.mu.Unlock()
	if set == nil {
		return notKept
	}
	return set.String(text)
}

func compile(patterns []string) (*textmask.Set, error) {
	return textmask.Compile([]textmask.Rule{{Patterns: patterns}})
}
