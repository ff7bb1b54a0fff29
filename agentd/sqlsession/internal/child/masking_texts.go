package child

import (
	"slices"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/mask"
	"github.com/postern-dev/postern/proto"
)

// Masks by pattern of the engines whose statements nobody can follow: they need not know
// where a value comes from. For rules for columns see masking_columns.go.

// columnMasks tells whether a policy masks columns.
func columnMasks(g *frame.Guard) bool {
	return slices.ContainsFunc(g.Masks, func(m frame.Mask) bool { return m.Pattern == "" || len(m.Columns) > 0 })
}

// notTexts are those of our types (by PostgreSQL's name) that are written as texts and
// are none: a number that was changed would be none.
var notTexts = map[string]bool{"numeric": true, "interval": true}

// look has all texts and bytes of a result looked at.
func (m *masking) look(fields []field) {
	if m == nil {
		return
	}
	for i := range fields {
		f := &fields[i]
		if f.mask != nil || f.layout != layoutText || notTexts[f.meta[1]] {
			continue
		}
		f.texts, f.oid = m.texts, mask.OIDAnyText
	}
}

// scrubReply takes what matches out of what is said besides rows.
func (m *masking) scrubReply(done *frame.DoneReply, failure *proto.Error) {
	if m == nil {
		return
	}
	if failure != nil {
		failure.Message, failure.Err = m.texts.String(failure.Message), nil
		if failure.SQL != nil {
			failure.SQL.Hint, failure.SQL.Detail = m.texts.String(failure.SQL.Hint), m.texts.String(failure.SQL.Detail)
		}
	}
	for i := range done.Notices {
		done.Notices[i].Message = m.texts.String(done.Notices[i].Message)
	}
}
