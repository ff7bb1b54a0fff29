package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
)

// maxAuditPage bounds the memory of one listing, in bytes; the entry that
// crosses it is still in.
const maxAuditPage = 8 << 20

// AuditHead returns the head of an organization's chain; zero if it is empty.
func (s *Store) AuditHead(ctx context.Context, org string) (auditchain.Head, error) {
	return s.head(ctx, "SELECT sequence, hash FROM audit_heads WHERE organization = ?", org)
}

func (s *Store) head(ctx context.Context, query, key string) (auditchain.Head, error) {
	var sequence int64
	var hash []byte
	err := s.reader().row(ctx, query, key).Scan(&sequence, &hash)
	if errors.Is(err, sql.ErrNoRows) {
		return auditchain.Head{}, nil
	}
	if err != nil {
		return auditchain.Head{}, s.fail(ctx, "read an audit head", err)
	}
	sum, err := array32(hash)
	return auditchain.Head{Sequence: uint64(sequence), Hash: sum}, err
}

// AppendAudit appends sealed entries after prev and moves the head, durably and
// all or nothing. If prev is no longer the head, somebody else was first:
// ALREADY_EXISTS, and nothing is written.
func (s *Store) AppendAudit(ctx context.Context, org string, prev auditchain.Head, lines [][]byte, head auditchain.Head) error {
	return s.appendAudit(ctx, org, prev, lines, head, nil)
}

// appendAudit is AppendAudit; also writes something else in the same transaction.
func (s *Store) appendAudit(ctx context.Context, org string, prev auditchain.Head, lines [][]byte, head auditchain.Head, also func(tx handle) error) error {
	if head.Sequence != prev.Sequence+uint64(len(lines)) {
		return fmt.Errorf("append %d audit entries: head %d does not follow %d", len(lines), head.Sequence, prev.Sequence)
	}
	moved := proto.Errorf(proto.CodeAlreadyExists, "the audit chain has moved on from entry %d", prev.Sequence)
	return s.write(ctx, "append to the audit log", func(tx handle) error {
		if also != nil {
			if err := also(tx); err != nil || len(lines) == 0 {
				return err
			}
		}
		var n int64
		var err error
		if prev.Sequence == 0 {
			n, err = tx.exec(ctx, "INSERT INTO audit_heads (organization, sequence, hash) VALUES (?, ?, ?) ON CONFLICT DO NOTHING", org, int64(head.Sequence), head.Hash[:])
		} else {
			n, err = tx.exec(ctx, "UPDATE audit_heads SET sequence = ?, hash = ? WHERE organization = ? AND sequence = ? AND hash = ?",
				int64(head.Sequence), head.Hash[:], org, int64(prev.Sequence), prev.Hash[:])
		}
		if err != nil {
			return err
		}
		if n != 1 {
			return moved
		}
		next := int64(prev.Sequence) + 1
		values := make([]any, 0, 3*len(lines))
		for _, line := range lines {
			values = append(values, org, next, line)
			next++
		}
		err = tx.insert(ctx, "INSERT INTO audit (organization, sequence, line) VALUES ", 3, "", values)
		if isUnique(err) {
			return fmt.Errorf("audit entry %d of %s or a later one exists although the head says otherwise: run `postern audit verify`: %w", prev.Sequence+1, org, err)
		}
		return err
	})
}

// RetireAudit appends sealed entries as AppendAudit does, and drops the entries up to
// through with it. NOT_FOUND if there are none: somebody else was first, and nothing is
// written.
func (s *Store) RetireAudit(ctx context.Context, org string, through uint64, prev auditchain.Head, lines [][]byte, head auditchain.Head) error {
	if through > prev.Sequence {
		return proto.Errorf(proto.CodeAlreadyExists, "the audit chain has moved on from entry %d", prev.Sequence)
	}
	if len(lines) == 0 {
		return fmt.Errorf("retire audit entries up to %d with none that stands for them", through)
	}
	return s.appendAudit(ctx, org, prev, lines, head, func(tx handle) error {
		n, err := tx.exec(ctx, "DELETE FROM audit WHERE organization = ? AND sequence <= ?", org, int64(through))
		if err == nil && n == 0 {
			return proto.Errorf(proto.CodeNotFound, "there are no audit entries up to %d", through)
		}
		return err
	})
}

// AuditOrganizations are the ids of the organizations that have a chain.
func (s *Store) AuditOrganizations(ctx context.Context) ([]string, error) {
	const op = "read the audit logs' heads"
	rows, err := s.reader().query(ctx, "SELECT organization FROM audit_heads ORDER BY organization")
	if err != nil {
		return nil, s.fail(ctx, op, err)
	}
	defer func() { _ = rows.Close() }()
	var all []string
	for rows.Next() {
		var one string
		if err := rows.Scan(&one); err != nil {
			return nil, s.fail(ctx, op, err)
		}
		all = append(all, one)
	}
	return all, s.fail(ctx, op, rows.Err())
}

// AuditAfter returns at most limit entries whose number is above after, in
// ascending order, and the last one's number as the store has it. It returns
// fewer when they are long, but at least one if there is one.
func (s *Store) AuditAfter(ctx context.Context, org string, after uint64, limit int) (lines [][]byte, last uint64, err error) {
	if after > math.MaxInt64 {
		return nil, after, nil
	}
	return s.auditPage(ctx, after, "SELECT sequence, line FROM audit WHERE organization = ? AND sequence > ? ORDER BY sequence LIMIT ?",
		org, int64(after), limit)
}

// AuditNewest returns at most limit entries, newest first; fewer when they are
// long.
func (s *Store) AuditNewest(ctx context.Context, org string, limit int) ([][]byte, error) {
	lines, _, err := s.auditPage(ctx, 0, "SELECT sequence, line FROM audit WHERE organization = ? ORDER BY sequence DESC LIMIT ?", org, limit)
	return lines, err
}

func (s *Store) auditPage(ctx context.Context, last uint64, query string, args ...any) ([][]byte, uint64, error) {
	const op = "read the audit log"
	rows, err := s.reader().query(ctx, query, args...)
	if err != nil {
		return nil, last, s.fail(ctx, op, err)
	}
	defer func() { _ = rows.Close() }()
	var lines [][]byte
	for size := 0; size < maxAuditPage && rows.Next(); {
		var sequence int64
		var line []byte
		if err := rows.Scan(&sequence, &line); err != nil {
			return nil, last, s.fail(ctx, op, err)
		}
		lines, last, size = append(lines, line), uint64(sequence), size+len(line)
	}
	return lines, last, s.fail(ctx, op, rows.Err())
}

// AgentAuditHead returns the newest head of an agent's own chain that was
// recorded; zero if none was.
func (s *Store) AgentAuditHead(ctx context.Context, agent string) (auditchain.Head, error) {
	return s.head(ctx, "SELECT sequence, hash FROM agent_audit_heads WHERE agent = ?", agent)
}

// SetAgentAuditHead records the head of an agent's own chain. It never moves
// back: a head that is older than the recorded one is left out, and the result
// is false. It does not wait for the disk: thousands of agents come back at once,
// and an older head loses nothing but sharpness.
func (s *Store) SetAgentAuditHead(ctx context.Context, agent string, head auditchain.Head) (bool, error) {
	var n int64
	err := s.writeRelaxed(ctx, "record an agent's audit head", func(tx handle) error {
		var err error
		n, err = tx.exec(ctx, `INSERT INTO agent_audit_heads (agent, sequence, hash) VALUES (?, ?, ?)
			ON CONFLICT (agent) DO UPDATE SET sequence = excluded.sequence, hash = excluded.hash
			WHERE agent_audit_heads.sequence <= excluded.sequence`, agent, int64(head.Sequence), head.Hash[:])
		return err
	})
	return n == 1, err
}
