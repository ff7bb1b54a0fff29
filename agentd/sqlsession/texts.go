package sqlsession

import (
	"github.com/postern-dev/postern/agentd/sqlsession/internal/mask"
)

// Texts masks what matches a policy's patterns in texts that are not rows:
// statements and messages. Safe for concurrent use; nil masks nothing.
type Texts struct {
	texts *mask.Texts
}

// NewTexts returns nil if the policy has no patterns. The error is one line.
func NewTexts(g Guard) (*Texts, error) {
	var patterns []mask.Pattern
	for _, m := range g.Masks {
		if m.Pattern != "" {
			patterns = append(patterns, mask.Pattern{Expr: m.Pattern, Rule: mask.Rule{Kind: mask.Kind(m.With), Keep: m.Keep}})
		}
	}
	texts, err := mask.NewTexts(patterns, g.MaskKey)
	if texts == nil {
		return nil, err
	}
	return &Texts{texts}, nil
}

// String returns text without what matches.
func (t *Texts) String(text string) string {
	if t == nil {
		return text
	}
	return t.texts.String(text)
}
