package query

import (
	"strings"
	"sync"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/textmask"
)

// notKept stands for a text whose source's patterns this version can't read.
const notKept = "(not kept)"

// maxMaskers bounds the sets of patterns that are kept compiled; one takes some
// tens of KiB.
const maxMaskers = 256

// maskers are compiled patterns of sources, by the patterns. Safe for concurrent
// use.
type maskers struct {
	mu  sync.Mutex
	all map[string]*textmask.Set // nil: they can't be compiled
}

// of returns what takes out of texts that are stored what a source's host says
// must not be.
func (m *maskers) of(agent *posternv1.Agent, source string) func(string) string {
	var patterns []string
	for _, s := range agent.GetSources() {
		if s.Name == source {
			patterns = s.TextPatterns
		}
	}
	if len(patterns) == 0 {
		return func(text string) string { return text }
	}
	set := m.set(patterns)
	return func(text string) string {
		switch {
		case text == "":
			return ""
		case set == nil:
			return notKept
		}
		return set.String(text)
	}
}

func (m *maskers) set(patterns []string) *textmask.Set {
	key := strings.Join(patterns, "\x00")
	m.mu.Lock()
	defer m.mu.Unlock()
	set, known := m.all[key]
	if known {
		return set
	}
	set, err := textmask.Compile([]textmask.Rule{{Patterns: patterns}})
	if err != nil {
		set = nil
	}
	if m.all == nil || len(m.all) >= maxMaskers {
		m.all = make(map[string]*textmask.Set)
	}
	m.all[key] = set
	return set
}

// maskedError is e as it is stored.
func maskedError(e *posternv1.ErrorDetail, mask func(string) string) *posternv1.ErrorDetail {
	if e == nil {
		return nil
	}
	out := gproto.Clone(e).(*posternv1.ErrorDetail)
	if out.Message = mask(e.Message); out.Message == notKept {
		out.Message = proto.PublicMessage(e.Code) + " (the text is not kept)"
	}
	if out.Sql != nil {
		out.Sql.Hint, out.Sql.Detail = mask(out.Sql.Hint), mask(out.Sql.Detail)
	}
	return out
}
