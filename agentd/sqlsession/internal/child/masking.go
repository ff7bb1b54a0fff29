package child

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/lineage"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/mask"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgverb"
	"github.com/postern-dev/postern/proto"
)

// parseTime bounds the wait for the parser.
const parseTime = 10 * time.Second

// maxCatalogRows bounds what is read of the catalog for one statement.
const maxCatalogRows = 50_000

// minMaskKey is the shortest key in bytes.
const minMaskKey = 16

// masking is what a policy says of values, made ready; nil: nothing is masked.
type masking struct {
	key     []byte
	masks   []frame.Mask
	filters string
	policy  lineage.Policy
	texts   *mask.Texts
}

// newMasking returns nil for a policy without masks.
func newMasking(g *frame.Guard) (*masking, error) {
	if len(g.Masks) == 0 {
		return nil, nil
	}
	if len(g.MaskKey) < minMaskKey {
		return nil, errors.New("the data source masks values and has no key for it")
	}
	m := &masking{key: g.MaskKey, masks: g.Masks, filters: g.MaskFilters}
	m.policy = lineage.Policy{Filters: g.MaskFilters, Safe: g.SafeFunctions, Functions: g.Functions}
	var patterns []mask.Pattern
	for _, r := range g.Masks {
		m.policy.Rules = append(m.policy.Rules, lineage.Rule{Columns: r.Columns, Null: r.With == string(mask.Null) || r.With == string(mask.Noise)})
		if r.Pattern != "" {
			patterns = append(patterns, mask.Pattern{Expr: r.Pattern, Rule: ruleOf(r)})
		}
	}
	var err error
	m.texts, err = mask.NewTexts(patterns, m.key)
	return m, err
}

func ruleOf(r frame.Mask) mask.Rule {
	return mask.Rule{Kind: mask.Kind(r.With), Keep: r.Keep, Noise: r.Noise}
}

// same tells whether the policy is still the one that m was made of.
func (m *masking) same(g *frame.Guard) bool {
	if m == nil {
		return len(g.Masks) == 0
	}
	return m.filters == g.MaskFilters && reflect.DeepEqual(m.masks, g.Masks) && string(m.key) == string(g.MaskKey) &&
		reflect.DeepEqual(m.policy.Safe, g.SafeFunctions) && reflect.DeepEqual(m.policy.Functions, g.Functions)
}

// masksOf makes the masking of a statement's policy, or takes that of the
// statement before.
func (s *session) masksOf(g *frame.Guard) (*masking, *proto.Error) { return masksOf(&s.masking, g) }

func masksOf(last **masking, g *frame.Guard) (*masking, *proto.Error) {
	if (*last).same(g) {
		return *last, nil
	}
	m, err := newMasking(g)
	if err != nil {
		*last = nil
		return nil, proto.Errorf(proto.CodeSourceConfig, "%w", err)
	}
	*last = m
	return m, nil
}

// hidden is how one statement's result is masked.
type hidden struct {
	// columns are the masks by column; nil where there is none.
	columns []*mask.Column
	kinds   []mask.Kind
}

// hide finds out which columns of the statement's result are masked. The server
// has parsed the statement and its transaction is open; fields are its description
// of the result.
func (x *execution) hide(fields []pgproto3.FieldDescription) (*hidden, *proto.Error) {
	m := x.masking
	if m == nil || !m.policy.Active() {
		return newHidden(len(fields)), nil
	}
	ctx, done := context.WithTimeout(context.Background(), parseTime)
	defer done()
	text, position := x.text.Text, x.text.Position
	if x.verb != nil {
		switch x.verb.Kind {
		case pgverb.Execute:
			// What it is given comes first, then the query, as names are now.
			if _, failure := x.follow(ctx, m, text, position); failure != nil {
				return nil, failure
			}
			text, position = x.query, x.queryPosition
		case pgverb.Declare:
			plan, failure := x.follow(ctx, m, x.query, x.queryPosition)
			if failure != nil {
				return nil, failure
			}
			for _, c := range plan.Columns {
				if c.Masked {
					return nil, denied(0, "the statement is refused: a cursor over the masked column %s: run the query itself", c.Source)
				}
			}
			x.touches = plan.Touches
			return newHidden(len(fields)), nil
		default:
			// PREPARE is looked at when it is run; what a cursor reads was looked
			// at when it was declared.
			x.touches = true
			return newHidden(len(fields)), nil
		}
	}
	plan, failure := x.follow(ctx, m, text, position)
	if failure != nil {
		return nil, failure
	}
	x.touches = plan.Touches
	return m.match(plan, fields)
}

// follow analyzes one statement. text is what the server parsed, position brings
// positions in it back to the user's text.
func (s *session) follow(ctx context.Context, m *masking, text string, position func(int) int) (*lineage.Plan, *proto.Error) {
	tree, failure := s.tree(ctx, text, position)
	switch {
	case failure != nil:
		return nil, failure
	case len(tree.Stmts) == 0:
		return &lineage.Plan{}, nil
	case len(tree.Stmts) > 1:
		return nil, denied(0, "the statement is refused: the data source masks columns, and the text is not one statement")
	}
	plan, err := lineage.Analyze(ctx, text, tree.Stmts[0].Stmt, s.parser, lineage.SQLCatalog{Query: s.catalogRows}, &m.policy)
	var refusal *lineage.Refusal
	switch {
	case errors.As(err, &refusal):
		return nil, denied(position(refusal.Position), "the statement is refused: %s", refusal.Reason)
	case err != nil:
		return nil, unparsed(err)
	}
	return plan, nil
}

func newHidden(columns int) *hidden {
	return &hidden{columns: make([]*mask.Column, columns), kinds: make([]mask.Kind, columns)}
}

// match holds the server's description of a result against its plan, and makes
// the masks. Where both differ neither is trusted.
func (m *masking) match(plan *lineage.Plan, fields []pgproto3.FieldDescription) (*hidden, *proto.Error) {
	h := newHidden(len(fields))
	if !plan.Known {
		return h, nil
	}
	if len(plan.Columns) != len(fields) {
		return nil, disagree()
	}
	for i := range fields {
		f, c := &fields[i], &plan.Columns[i]
		if c.Named && c.Name != string(f.Name) {
			return nil, disagree()
		}
		if f.TableOID != 0 {
			masked, unknown := plan.MaskedOrigin(f.TableOID, int16(f.TableAttributeNumber))
			other := c.Relation != 0 && (c.Relation != f.TableOID || c.Number != int16(f.TableAttributeNumber))
			if unknown || other || masked && !c.Masked {
				return nil, disagree()
			}
		}
		if !c.Masked {
			continue
		}
		rule := mask.Rule{Kind: mask.Redact}
		switch {
		case c.Plain:
			rule = ruleOf(m.masks[c.Rule])
		case c.Null:
			rule.Kind = mask.Null
		}
		h.columns[i] = mask.NewColumn(rule, f.DataTypeOID, c.Source, m.key)
		h.kinds[i] = rule.Kind
	}
	return h, nil
}

// unparsed is for a text that could not be looked at.
func unparsed(err error) *proto.Error {
	var e *proto.Error
	if errors.As(err, &e) {
		return e
	}
	return proto.Errorf(proto.CodeUnavailable, "what the data source masks can't be followed: %s", last(err))
}

// disagree is for a result of which the server says something else than we found:
// then neither is trusted.
func disagree() *proto.Error {
	return denied(0, "the statement is refused: the data source masks columns, and where this result comes from is not certain: write it in a simpler way")
}

// catalogRows runs our own SQL in the statement's transaction.
func (s *session) catalogRows(sql string) ([][]string, error) {
	if err := s.wire.send(&pgproto3.Query{String: sql}); err != nil {
		return nil, err
	}
	if err := s.wire.flush(); err != nil {
		return nil, err
	}
	var rows [][]string
	bytes := 0
	refusal, err := s.wire.untilReady(func(t byte, body []byte) error {
		if t != 'D' || len(rows) > maxCatalogRows || bytes > 16<<20 {
			return nil
		}
		var row pgproto3.DataRow
		if err := row.Decode(body); err != nil {
			return fmt.Errorf("%w: %v", errProtocol, err)
		}
		texts := make([]string, len(row.Values))
		for i, v := range row.Values {
			texts[i] = string(v)
		}
		bytes += len(body)
		rows = append(rows, texts)
		return nil
	})
	switch {
	case err != nil:
		return nil, proto.Errorf(proto.CodeSourceUnreachable, "%s was lost: %s", s.name(), last(err))
	case refusal != nil:
		return nil, sqlError(refusal, nil)
	case len(rows) > maxCatalogRows || bytes > 16<<20:
		return nil, &lineage.Refusal{Reason: "the statement names more of the catalog than can be followed on a data source that masks columns"}
	}
	return rows, nil
}

// scrub takes from the server's error what may hold masked values.
func (m *masking) scrub(e *pgproto3.ErrorResponse, touches bool) *pgproto3.ErrorResponse {
	if m == nil {
		return e
	}
	if touches {
		message := ownWords[e.Code]
		if message == "" {
			message = "the reason is not told, as the statement reads or writes masked columns"
		}
		return &pgproto3.ErrorResponse{Code: e.Code, Message: message}
	}
	safe := *e
	safe.Message, safe.Hint, safe.Detail = m.texts.String(e.Message), m.texts.String(e.Hint), m.texts.String(e.Detail)
	return &safe
}
