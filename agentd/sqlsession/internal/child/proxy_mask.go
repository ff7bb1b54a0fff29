package child

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/lineage"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/mask"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgproxy"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/proto"
)

// wireAnswers is where a question to the catalog through a proxy is cut.
const wireAnswers = 10_000

// wireMasks follows the masked columns of a client's statement; nil: the policy
// masks no columns.
func wireMasks(ctx context.Context, m *masking, parser pgtree.Parser, server pgproxy.Asker, text string, tree *pgtree.Tree) (pgproxy.Hider, *pgproxy.Refusal) {
	if m == nil || !m.policy.Active() {
		return nil, nil
	}
	ask := func(sql string) ([][]string, error) {
		rows, err := server.Ask(ctx, sql)
		if err == nil && len(rows) >= wireAnswers {
			err = &lineage.Refusal{Reason: "the statement names more of the catalog than can be followed on a data source that masks columns"}
		}
		return rows, err
	}
	plan, err := lineage.Analyze(ctx, text, tree.GetStmts()[0].GetStmt(), parser, lineage.SQLCatalog{Query: ask, OneByOne: true}, &m.policy)
	var refusal *lineage.Refusal
	var theirs *pgproxy.Refusal
	switch {
	case errors.As(err, &refusal):
		return nil, &pgproxy.Refusal{SQLState: "42501", Message: "the statement is refused: " + refusal.Reason, Position: refusal.Position}
	case errors.As(err, &theirs):
		return nil, theirs
	case err != nil:
		return nil, &pgproxy.Refusal{SQLState: "42501", Message: "the statement is refused: what the data source masks can't be followed: " + last(err)}
	}
	return wireHide{masking: m, plan: plan}, nil
}

// wireHide masks the results of a client of PostgreSQL's protocol. Without a plan
// it is for statements that read no tables: patterns alone count.
type wireHide struct {
	masking *masking
	plan    *lineage.Plan
}

// Rows implements pgproxy.Hider.
func (h wireHide) Rows(fields []pgproto3.FieldDescription) (*mask.Row, *pgproxy.Refusal) {
	hidden := newHidden(len(fields))
	if h.plan != nil {
		own, refused := h.masking.match(h.plan, fields)
		if refused != nil {
			return nil, &pgproxy.Refusal{SQLState: "42501", Message: refused.Error()}
		}
		hidden = own
	}
	oids := make([]uint32, len(fields))
	for i, f := range fields {
		oids[i] = f.DataTypeOID
	}
	return mask.NewRow(hidden.columns, oids, h.masking.texts), nil
}

// Masked implements pgproxy.Hider.
func (h wireHide) Masked() string {
	if h.plan != nil {
		for _, c := range h.plan.Columns {
			if c.Masked {
				return c.Source
			}
		}
	}
	return ""
}

// Error implements pgproxy.Hider.
func (h wireHide) Error(body []byte, ran bool) *pgproxy.Refusal {
	e := decodeError(body)
	touches := h.masking.policy.Active() && (h.plan == nil || h.plan.Touches) && ran
	if touches && tellable[e.Code] && parserFile(e.File) && e.Where == "" && e.InternalQuery == "" {
		touches = false // names and types, before anything runs
	}
	safe := h.masking.scrub(e, touches)
	if !touches && safe.Message == e.Message && safe.Hint == e.Hint && safe.Detail == e.Detail {
		return nil
	}
	return &pgproxy.Refusal{SQLState: clean(e.Code), Message: clean(safe.Message), Hint: clean(safe.Hint), Position: int(safe.Position), Code: proto.CodeSQL}
}
