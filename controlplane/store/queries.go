package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	posternproto "github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// The history's bounds: per organization, this many queries of at most this age,
// each with at most this much of its text. Running queries are kept.
const (
	maxQueries      = 10_000
	maxQueryText    = 64 << 10
	pruneEvery      = 64  // inserts
	pruneBatch      = 256 // rows at a time, so that nobody waits long
	defaultQueries  = 50
	longestQueryRow = 1000 // rows in one listing
)

// DefaultHistoryAge is how long queries and their rows are kept.
const DefaultHistoryAge = 30 * 24 * time.Hour

// stateRunning is the one state that a query leaves.
const stateRunning = "running"

const queryColumns = "q.id, q.agent, q.source, q.token_name, q.sql_text, q.state, q.started, q.duration, q.row_count, q.byte_count, q.error, q.session, q.kernel"

type queryRow struct {
	q                 posternv1.Query
	started, duration int64
	rows, bytes       int64
	failure           []byte
}

func (r *queryRow) into() []any {
	return []any{
		&r.q.Id, &r.q.Agent, &r.q.Source, &r.q.TokenName, &r.q.Sql, &r.q.State, &r.started, &r.duration, &r.rows, &r.bytes, &r.failure, &r.q.SessionId, &r.q.KernelId,
	}
}

func (r *queryRow) value() (*posternv1.Query, error) {
	r.q.Started = stamp(r.started)
	r.q.Rows, r.q.Bytes = uint64(r.rows), uint64(r.bytes)
	if r.q.State != stateRunning {
		r.q.Duration = durationpb.New(time.Duration(r.duration) * time.Microsecond)
	}
	if r.failure != nil {
		r.q.Error = &posternv1.ErrorDetail{}
		if err := proto.Unmarshal(r.failure, r.q.Error); err != nil {
			return nil, fmt.Errorf("error of query %s in the store: %w", r.q.Id, err)
		}
	}
	return &r.q, nil
}

// InsertQuery records a query that begins. token is the id of the API token it
// runs for. Now and then it forgets the oldest of the history.
func (s *Store) InsertQuery(ctx context.Context, org, token string, q *posternv1.Query) error {
	failure, err := encodeFailure(q.Error)
	if err != nil {
		return err
	}
	started := q.Started.AsTime()
	err = s.writeRelaxed(ctx, "record a query", func(tx handle) error {
		_, err := tx.exec(ctx, `INSERT INTO queries (id, organization, token, token_name, agent, source, sql_text, state, started, duration, row_count, byte_count, error, replica, session)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
			q.Id, org, token, q.TokenName, q.Agent, plainText(q.Source), cutText(q.Sql), q.State, millis(started),
			q.Duration.AsDuration().Microseconds(), int64(q.Rows), int64(q.Bytes), failure, s.replica, sessionText(q.SessionId))
		return err
	})
	if err != nil || !s.pruneDue(1) {
		return err
	}
	if _, err := s.PruneQueries(ctx, org, started); err != nil {
		s.log.WarnContext(ctx, "history not pruned", "organization", org, "err", err)
	}
	return nil
}

// maxSessionID bounds a session's id in bytes: a caller may name any.
const maxSessionID = 100

func sessionText(id string) string {
	id = plainText(id)
	if len(id) > maxSessionID {
		id = strings.ToValidUTF8(id[:maxSessionID], "")
	}
	return id
}

// cutText bounds a statement's text and says so in it.
func cutText(text string) string {
	text = plainText(text)
	if len(text) <= maxQueryText {
		return text
	}
	return fmt.Sprintf("%s… (cut, %d bytes in all)", strings.ToValidUTF8(text[:maxQueryText], ""), len(text))
}

func encodeFailure(d *posternv1.ErrorDetail) ([]byte, error) {
	if d == nil {
		return nil, nil
	}
	failure, err := proto.Marshal(d)
	if err != nil {
		return nil, posternproto.Errorf(posternproto.CodeInvalid, "the query's error cannot be encoded: %w", err)
	}
	return failure, nil
}

// FinishQuery records how a query ended: state, duration, rows, bytes and error
// of q are taken. One that has ended already is left as it is.
func (s *Store) FinishQuery(ctx context.Context, org string, q *posternv1.Query) error {
	failure, err := encodeFailure(q.Error)
	if err != nil {
		return err
	}
	return s.writeRelaxed(ctx, "record a query's end", func(tx handle) error {
		_, err := tx.exec(ctx, `UPDATE queries SET state = ?, duration = ?, row_count = ?, byte_count = ?, error = ?
			WHERE organization = ? AND id = ? AND state = 'running'`,
			q.State, q.Duration.AsDuration().Microseconds(), int64(q.Rows), int64(q.Bytes), failure, org, q.Id)
		return err
	})
}

// LostQueries are the queries that an earlier process with the same
// Config.Replica left running when it died, by organization; call it at start,
// before the first query, and FailRunningQueries when they are dealt with.
func (s *Store) LostQueries(ctx context.Context) (map[string][]*posternv1.Query, error) {
	return s.LostQueriesOf(ctx, s.replica)
}

// LostQueriesOf is LostQueries for a replica that is dead.
func (s *Store) LostQueriesOf(ctx context.Context, replica string) (map[string][]*posternv1.Query, error) {
	lost := map[string][]*posternv1.Query{}
	rows, err := s.reader().query(ctx, "SELECT q.organization, "+queryColumns+" FROM queries q WHERE q.state = 'running' AND q.replica = ? "+
		"UNION ALL SELECT q.organization, "+strings.Replace(queryColumns, "q.started", "q.started / 1000", 1)+" FROM wire_queries q WHERE q.state = 'running' AND q.replica = ?", replica, replica)
	_, err = collect(ctx, s, "list lost queries", rows, err, func(rows *sql.Rows) (*posternv1.Query, error) {
		var org string
		var r queryRow
		if err := rows.Scan(append([]any{&org}, r.into()...)...); err != nil {
			return nil, err
		}
		q, err := r.value()
		lost[org] = append(lost[org], q)
		return q, err
	})
	return lost, err
}

// FailRunningQueries ends what an earlier process with the same Config.Replica
// left running when it died; call it at start, before the first query. It
// returns their number.
func (s *Store) FailRunningQueries(ctx context.Context, why *posternv1.ErrorDetail, now time.Time) (int, error) {
	return s.FailRunningQueriesOf(ctx, s.replica, why, now)
}

// FailRunningQueriesOf is FailRunningQueries for a replica that is dead.
func (s *Store) FailRunningQueriesOf(ctx context.Context, replica string, why *posternv1.ErrorDetail, now time.Time) (int, error) {
	failure, err := encodeFailure(why)
	if err != nil {
		return 0, err
	}
	var n int64
	err = s.write(ctx, "end the queries of a process that died", func(tx handle) error {
		n = 0
		for _, table := range []struct {
			name string
			now  int64 // in the table's unit
			unit int   // microseconds
		}{{"queries", millis(now), 1000}, {"wire_queries", now.UnixMicro(), 1}} {
			some, err := tx.exec(ctx, "UPDATE "+table.name+` SET state = 'failed', error = ?, duration = (CASE WHEN started < ? THEN (? - started) * ? ELSE 0 END)
				WHERE state = 'running' AND replica = ?`, failure, table.now, table.now, table.unit, replica)
			if err != nil {
				return err
			}
			n += some
		}
		return nil
	})
	return int(n), err
}

// GetQuery returns one query of the history, of PostgreSQL clients as well. A token's id limits it to that
// token's; empty means any.
func (s *Store) GetQuery(ctx context.Context, org, token, id string) (*posternv1.Query, error) {
	query, args := "SELECT "+queryColumns+" FROM queries q WHERE q.organization = ? AND q.id = ?", []any{org, plainText(id)}
	if token != "" {
		query, args = query+" AND q.token = ?", append(args, token)
	}
	var r queryRow
	err := s.reader().row(ctx, query, args...).Scan(r.into()...)
	if errors.Is(err, sql.ErrNoRows) {
		return s.wireQuery(ctx, org, token, id)
	}
	if err != nil {
		return nil, s.fail(ctx, "get query", err)
	}
	return r.value()
}

// ListQueries lists the history, newest first: 50 if limit is 0, at most 1000. A
// token's id limits it to that token's; empty means all.
func (s *Store) ListQueries(ctx context.Context, org, token string, limit int, runningOnly bool) ([]*posternv1.Query, error) {
	if limit <= 0 {
		limit = defaultQueries
	}
	query, args := "SELECT "+queryColumns+" FROM queries q WHERE q.organization = ?", []any{org}
	if token != "" {
		query, args = query+" AND q.token = ?", append(args, token)
	}
	if runningOnly {
		query += " AND q.state = 'running'"
	}
	limit = min(limit, longestQueryRow)
	rows, err := s.reader().query(ctx, query+" ORDER BY q.started DESC, q.id DESC LIMIT ?", append(args, limit)...)
	all, err := collect(ctx, s, "list queries", rows, err, func(rows *sql.Rows) (*posternv1.Query, error) {
		var r queryRow
		if err := rows.Scan(r.into()...); err != nil {
			return nil, err
		}
		return r.value()
	})
	if err != nil {
		return nil, err
	}
	wire, err := s.wireQueries(ctx, org, token, limit, runningOnly)
	if err != nil || len(wire) == 0 {
		return all, err
	}
	all = append(all, wire...)
	slices.SortStableFunc(all, func(a, b *posternv1.Query) int {
		if c := b.Started.AsTime().Compare(a.Started.AsTime()); c != 0 {
			return c
		}
		return strings.Compare(b.Id, a.Id)
	})
	return all[:min(len(all), limit)], nil
}

// pruneDue counts inserts, and tells when it is time to look at the bounds.
func (s *Store) pruneDue(inserts int) bool {
	s.pruneMu.Lock()
	defer s.pruneMu.Unlock()
	s.inserts += inserts
	if s.inserts < pruneEvery {
		return false
	}
	s.inserts = 0
	return true
}

// PruneQueries forgets one batch of what the history holds beyond its bounds, of
// every organization by age and of this one by number, and returns its size.
// InsertQuery calls it often enough for the number; the age is the caller's
// business, too: organizations that ask nothing any more grow old as well.
func (s *Store) PruneQueries(ctx context.Context, org string, now time.Time) (int, error) {
	var n int64
	err := s.writeRelaxed(ctx, "prune the history", func(tx handle) error {
		old, err := tx.exec(ctx, `DELETE FROM queries WHERE id IN
			(SELECT id FROM queries WHERE started < ? AND state <> 'running' ORDER BY started LIMIT ?)`, millis(now.Add(-s.age)), pruneBatch)
		if err != nil {
			return err
		}
		many, err := tx.exec(ctx, `DELETE FROM queries WHERE state <> 'running' AND id IN
			(SELECT id FROM queries WHERE organization = ? ORDER BY started DESC, id DESC LIMIT ? OFFSET ?)`, org, pruneBatch, s.keep)
		if err != nil {
			return err
		}
		wire, err := s.ageWire(ctx, tx, now)
		n = old + many + wire
		return err
	})
	return int(n), err
}
