package store

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxWireQueries bounds the statements of PostgreSQL clients in an organization's
	// history; they don't count among the others.
	maxWireQueries = 10_000
	// pruneWireEvery is how many may come before the bound is looked after.
	pruneWireEvery = 2_000
	// wireColumns is how many values a statement has.
	wireColumns = 15
)

// QueryRecord is the beginning or the end of a statement of a PostgreSQL client.
type QueryRecord struct {
	Organization string
	// Token is the API token's id.
	Token string
	Query *posternv1.Query
	// Known says that an earlier record has told of its beginning.
	Known bool
}

// RecordQueries records beginnings and ends in their order, all or nothing. A
// statement whose id is there already is left as it is, unless the record says that
// it is known and it has not ended.
func (s *Store) RecordQueries(ctx context.Context, records []QueryRecord) error {
	failures := make([][]byte, len(records))
	for i, r := range records {
		var err error
		if failures[i], err = encodeFailure(r.Query.Error); err != nil {
			return err
		}
	}
	due := s.wireDue(records)
	return s.writeRelaxed(ctx, "record queries", func(tx handle) error {
		var args []any
		flush := func() error {
			if len(args) == 0 {
				return nil
			}
			err := tx.insert(ctx, `INSERT INTO wire_queries
				(organization, id, token, token_name, agent, source, sql_text, state, started, duration, row_count, byte_count, error, replica, session) VALUES `,
				wireColumns, " ON CONFLICT DO NOTHING", args)
			args = args[:0]
			return err
		}
		for i, r := range records {
			q := r.Query
			if !r.Known {
				args = append(args, r.Organization, plainText(q.Id), r.Token, q.TokenName, q.Agent, plainText(q.Source), cutText(q.Sql), q.State,
					q.Started.AsTime().UnixMicro(), q.Duration.AsDuration().Microseconds(), int64(q.Rows), int64(q.Bytes), failures[i], s.replica, sessionText(q.SessionId))
				continue
			}
			if err := flush(); err != nil {
				return err
			}
			if _, err := tx.exec(ctx, `UPDATE wire_queries SET state = ?, duration = ?, row_count = ?, byte_count = ?, error = ?
				WHERE organization = ? AND id = ? AND state = 'running'`,
				q.State, q.Duration.AsDuration().Microseconds(), int64(q.Rows), int64(q.Bytes), failures[i], r.Organization, plainText(q.Id)); err != nil {
				return err
			}
		}
		if err := flush(); err != nil {
			return err
		}
		for _, org := range due {
			if err := s.pruneWire(ctx, tx, org); err != nil {
				return err
			}
		}
		return nil
	})
}

// wireDue counts what comes, and names the organizations whose bound is to be looked
// after.
func (s *Store) wireDue(records []QueryRecord) []string {
	s.pruneMu.Lock()
	defer s.pruneMu.Unlock()
	var due []string
	for _, r := range records {
		if r.Known {
			continue
		}
		n, known := s.wire[r.Organization]
		if n++; !known || n >= min(pruneWireEvery, s.keepWire) {
			due, n = append(due, r.Organization), 0
		}
		s.wire[r.Organization] = n
	}
	return due
}

// pruneWire forgets what is too much.
func (s *Store) pruneWire(ctx context.Context, tx handle, org string) error {
	_, err := tx.exec(ctx, `DELETE FROM wire_queries WHERE organization = ? AND state <> 'running' AND id <=
		(SELECT id FROM wire_queries WHERE organization = ? ORDER BY id DESC LIMIT 1 OFFSET ?)`, org, org, s.keepWire)
	return err
}

// ageWire forgets a batch of what is too old, of every organization, and returns its
// size.
func (s *Store) ageWire(ctx context.Context, tx handle, now time.Time) (int64, error) {
	return tx.exec(ctx, `DELETE FROM wire_queries WHERE (organization, id) IN (SELECT w.organization, w.id
		FROM organizations o JOIN wire_queries w ON w.organization = o.id AND w.id IN
			(SELECT x.id FROM wire_queries x WHERE x.organization = o.id ORDER BY x.id LIMIT ?)
		WHERE w.started < ? AND w.state <> 'running')`, pruneBatch, now.Add(-s.age).UnixMicro())
}

// wireQuery returns one statement of the history of PostgreSQL clients.
func (s *Store) wireQuery(ctx context.Context, org, token, id string) (*posternv1.Query, error) {
	query, args := "SELECT "+queryColumns+" FROM wire_queries q WHERE q.organization = ? AND q.id = ?", []any{org, plainText(id)}
	if token != "" {
		query, args = query+" AND q.token = ?", append(args, token)
	}
	var r queryRow
	err := s.reader().row(ctx, query, args...).Scan(r.into()...)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, notFound("query", id)
	}
	if err != nil {
		return nil, s.fail(ctx, "get query", err)
	}
	return r.wireValue()
}

// wireValue is value for wire_queries, whose times are in microseconds: statements of
// one session follow each other within a millisecond.
func (r *queryRow) wireValue() (*posternv1.Query, error) {
	q, err := r.value()
	if err == nil {
		q.Started = timestamppb.New(time.UnixMicro(r.started))
	}
	return q, err
}

// wireQueries lists that history, newest first.
func (s *Store) wireQueries(ctx context.Context, org, token string, limit int, runningOnly bool) ([]*posternv1.Query, error) {
	query, args := "SELECT "+queryColumns+" FROM wire_queries q WHERE q.organization = ?", []any{org}
	if token != "" {
		query, args = query+" AND q.token = ?", append(args, token)
	}
	if runningOnly {
		query += " AND q.state = 'running'"
	}
	rows, err := s.reader().query(ctx, query+" ORDER BY q.id DESC LIMIT ?", append(args, limit)...)
	return collect(ctx, s, "list queries", rows, err, func(rows *sql.Rows) (*posternv1.Query, error) {
		var r queryRow
		if err := rows.Scan(r.into()...); err != nil {
			return nil, err
		}
		return r.wireValue()
	})
}
