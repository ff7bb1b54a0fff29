package store

import (
	"context"
	"strings"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// StatementReport is what an agent tells of the statements that its kernels asked
// for: those of the entries of its own log above After, up to Through.
type StatementReport struct {
	Organization, Agent string
	After, Through      auditchain.Head
	Statements          []ReportedStatement
}

// ReportedStatement is one of them.
type ReportedStatement struct {
	// Token is the API token's id; "" if there is no such token any more.
	Token string
	Query *posternv1.Query
	// Kept are its sealed rows; nil: none.
	Kept []byte
}

// Reported is up to where an agent has reported; zero if it never did.
func (s *Store) Reported(ctx context.Context, agent string) (auditchain.Head, error) {
	return s.head(ctx, "SELECT sequence, hash FROM agent_reports WHERE agent = ?", agent)
}

// KnownQueries tells which of the ids are in the history.
func (s *Store) KnownQueries(ctx context.Context, ids []string) (map[string]bool, error) {
	known := map[string]bool{}
	if len(ids) == 0 {
		return known, nil
	}
	args := make([]any, len(ids))
	for i, id := range ids {
		args[i] = plainText(id)
	}
	list := "(" + strings.TrimSuffix(strings.Repeat("?, ", len(ids)), ", ") + ")"
	rows, err := s.reader().query(ctx, "SELECT id FROM queries WHERE id IN "+list+" UNION ALL SELECT id FROM wire_queries WHERE id IN "+list, append(args, args...)...)
	if err != nil {
		return nil, s.fail(ctx, "find queries", err)
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return nil, s.fail(ctx, "find queries", err)
		}
		known[id] = true
	}
	return known, s.fail(ctx, "find queries", rows.Err())
}

// AppendReport is AppendAudit that writes a report's statements into the history, too,
// and notes that the agent has reported up to Through: all of it or nothing. If the
// agent's reports don't end at After any more it is UNAVAILABLE.
func (s *Store) AppendReport(ctx context.Context, r StatementReport, prev auditchain.Head, lines [][]byte, head auditchain.Head) error {
	failures := make([][]byte, len(r.Statements))
	for i, one := range r.Statements {
		var err error
		if failures[i], err = encodeFailure(one.Query.Error); err != nil {
			return err
		}
	}
	due := make([]bool, len(r.Statements))
	for i, one := range r.Statements {
		due[i] = one.Kept != nil && s.keptDue(r.Organization, len(one.Kept))
	}
	moved := proto.Errorf(proto.CodeUnavailable, "another report of this agent was faster")
	now := time.Now()
	err := s.appendAudit(ctx, r.Organization, prev, lines, head, func(tx handle) error {
		var n int64
		var err error
		if r.After.Sequence == 0 {
			n, err = tx.exec(ctx, "INSERT INTO agent_reports (agent, sequence, hash) VALUES (?, ?, ?) ON CONFLICT DO NOTHING", r.Agent, int64(r.Through.Sequence), r.Through.Hash[:])
		} else {
			n, err = tx.exec(ctx, "UPDATE agent_reports SET sequence = ?, hash = ? WHERE agent = ? AND sequence = ? AND hash = ?",
				int64(r.Through.Sequence), r.Through.Hash[:], r.Agent, int64(r.After.Sequence), r.After.Hash[:])
		}
		if err != nil {
			return err
		}
		if n != 1 {
			return moved
		}
		for i, one := range r.Statements {
			q := one.Query
			if _, err := tx.exec(ctx, `INSERT INTO queries (id, organization, token, token_name, agent, source, sql_text, state, started, duration, row_count, byte_count, error, replica, session, kernel)
				VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING`,
				plainText(q.Id), r.Organization, one.Token, plainText(q.TokenName), q.Agent, plainText(q.Source), cutText(q.Sql), q.State, millis(q.Started.AsTime()),
				q.Duration.AsDuration().Microseconds(), int64(q.Rows), int64(q.Bytes), failures[i], s.replica, "", plainText(q.KernelId)); err != nil {
				return err
			}
			if one.Kept == nil {
				continue
			}
			if err := s.keepRows(ctx, tx, r.Organization, q.Id, one.Kept, now, due[i]); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil || !s.pruneDue(len(r.Statements)) {
		return err
	}
	if _, err := s.PruneQueries(ctx, r.Organization, now); err != nil {
		s.log.WarnContext(ctx, "history not pruned", "organization", r.Organization, "err", err)
	}
	return nil
}
