package store

import (
	"context"
	"database/sql"
	"errors"
	"time"

	posternproto "github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxKernels bounds the kernels of an organization, and maxKernelSessions the
	// sessions of a token on an agent.
	maxKernels        = 10_000
	maxKernelSessions = 1_000
	// maxSessionText bounds a session's path, name and type, each, in bytes.
	maxSessionText = 4096
)

// KernelRow is what is remembered of a kernel, wherever its agent is.
type KernelRow struct {
	ID string
	// Agent is the id of the agent that has it.
	Agent string
	// Owner is the token that started it: organization, id and name.
	Owner          *posternv1.Principal
	Spec, Language string
	Started        time.Time
}

// KernelSession is a notebook's path and its kernel, as Jupyter's clients keep them.
type KernelSession struct {
	ID, Kernel, Path, Name, Type string
}

const kernelColumns = "id, agent, organization, token, token_name, spec, language, started"

func scanKernel(scan func(...any) error) (KernelRow, error) {
	k := KernelRow{Owner: &posternv1.Principal{}}
	var started int64
	err := scan(&k.ID, &k.Agent, &k.Owner.Organization, &k.Owner.TokenId, &k.Owner.TokenName, &k.Spec, &k.Language, &started)
	k.Started = time.UnixMilli(started).UTC()
	return k, err
}

// InsertKernel remembers a kernel; one that is remembered already is left as it is.
// OVERLOADED means that the organization has too many.
func (s *Store) InsertKernel(ctx context.Context, k KernelRow) error {
	return s.write(ctx, "remember a kernel", func(tx handle) error {
		var n int
		if err := tx.row(ctx, "SELECT count(*) FROM kernels WHERE organization = ?", k.Owner.Organization).Scan(&n); err != nil {
			return err
		}
		if n >= maxKernels {
			return posternproto.Errorf(posternproto.CodeOverloaded, "the organization has %d kernels: stop some", n)
		}
		_, err := tx.exec(ctx, "INSERT INTO kernels ("+kernelColumns+") VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
			plainText(k.ID), k.Agent, k.Owner.Organization, plainText(k.Owner.TokenId), plainText(k.Owner.TokenName), plainText(k.Spec), plainText(k.Language), millis(k.Started))
		return err
	})
}

// DescribeKernel notes what became known of a kernel after it was started.
func (s *Store) DescribeKernel(ctx context.Context, organization, id, spec, language string) error {
	return s.writeRelaxed(ctx, "remember a kernel", func(tx handle) error {
		_, err := tx.exec(ctx, "UPDATE kernels SET spec = ?, language = ? WHERE organization = ? AND id = ?", plainText(spec), plainText(language), organization, plainText(id))
		return err
	})
}

// Kernel finds a kernel of an organization, or NOT_FOUND.
func (s *Store) Kernel(ctx context.Context, organization, id string) (KernelRow, error) {
	k, err := scanKernel(s.reader().row(ctx, "SELECT "+kernelColumns+" FROM kernels WHERE organization = ? AND id = ?", organization, plainText(id)).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return KernelRow{}, notFound("kernel", id)
	}
	return k, s.fail(ctx, "find a kernel", err)
}

// Kernels are those of an organization, in the order of their start; agent narrows
// them to one, by its id.
func (s *Store) Kernels(ctx context.Context, organization, agent string) ([]KernelRow, error) {
	query, args := "SELECT "+kernelColumns+" FROM kernels WHERE organization = ?", []any{organization}
	if agent != "" {
		query, args = query+" AND agent = ?", append(args, agent)
	}
	rows, err := s.reader().query(ctx, query+" ORDER BY started, id", args...)
	return collect(ctx, s, "list kernels", rows, err, func(rows *sql.Rows) (KernelRow, error) { return scanKernel(rows.Scan) })
}

// MoveKernel notes that a kernel is on another agent; its sessions go along. A kernel
// that is not remembered is let be.
func (s *Store) MoveKernel(ctx context.Context, organization, id, agent string) error {
	return s.write(ctx, "move a kernel", func(tx handle) error {
		if _, err := tx.exec(ctx, "UPDATE kernels SET agent = ? WHERE organization = ? AND id = ?", agent, organization, plainText(id)); err != nil {
			return err
		}
		_, err := tx.exec(ctx, "UPDATE kernel_sessions SET agent = ? WHERE organization = ? AND kernel = ?", agent, organization, plainText(id))
		return err
	})
}

// DeleteKernel forgets a kernel and its sessions; it may be gone already.
func (s *Store) DeleteKernel(ctx context.Context, organization, id string) error {
	return s.write(ctx, "forget a kernel", func(tx handle) error {
		_, err := tx.exec(ctx, "DELETE FROM kernels WHERE organization = ? AND id = ?", organization, plainText(id))
		return err
	})
}

// PutKernelSession keeps a session of a token on an agent, or changes the one with
// its id. Its kernel must be the same token's, on the same agent.
func (s *Store) PutKernelSession(ctx context.Context, owner *posternv1.Principal, agent string, k KernelSession, now time.Time) error {
	for _, text := range []string{k.ID, k.Path, k.Name, k.Type} {
		if len(text) > maxSessionText {
			return posternproto.Errorf(posternproto.CodeInvalid, "a session's path, name and type take at most %d bytes each", maxSessionText)
		}
	}
	return s.write(ctx, "keep a session", func(tx handle) error {
		var n int
		err := tx.row(ctx, "SELECT count(*) FROM kernels WHERE id = ? AND organization = ? AND agent = ? AND token = ?", plainText(k.Kernel), owner.Organization, agent, owner.TokenId).Scan(&n)
		if err == nil && n == 0 {
			err = notFound("kernel", k.Kernel)
		}
		if err != nil {
			return err
		}
		if err := tx.row(ctx, "SELECT count(*) FROM kernel_sessions WHERE organization = ? AND agent = ? AND token = ?", owner.Organization, agent, owner.TokenId).Scan(&n); err != nil {
			return err
		}
		if n >= maxKernelSessions {
			return posternproto.Errorf(posternproto.CodeOverloaded, "the token has %d notebook sessions on this agent: end some", n)
		}
		changed, err := tx.exec(ctx, `INSERT INTO kernel_sessions (id, organization, agent, token, kernel, path, name, kind, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
			ON CONFLICT (id) DO UPDATE SET kernel = excluded.kernel, path = excluded.path, name = excluded.name, kind = excluded.kind
			WHERE kernel_sessions.organization = excluded.organization AND kernel_sessions.agent = excluded.agent AND kernel_sessions.token = excluded.token`,
			plainText(k.ID), owner.Organization, agent, owner.TokenId, plainText(k.Kernel), plainText(k.Path), plainText(k.Name), plainText(k.Type), millis(now))
		if err == nil && changed == 0 {
			err = notFound("session", k.ID)
		}
		return err
	})
}

// KernelSessions are a token's sessions on an agent, the oldest first.
func (s *Store) KernelSessions(ctx context.Context, owner *posternv1.Principal, agent string) ([]KernelSession, error) {
	rows, err := s.reader().query(ctx, `SELECT id, kernel, path, name, kind FROM kernel_sessions
		WHERE organization = ? AND agent = ? AND token = ? ORDER BY created, id`, owner.Organization, agent, owner.TokenId)
	return collect(ctx, s, "list sessions", rows, err, func(rows *sql.Rows) (KernelSession, error) {
		var k KernelSession
		err := rows.Scan(&k.ID, &k.Kernel, &k.Path, &k.Name, &k.Type)
		return k, err
	})
}

// DeleteKernelSession forgets a session, or NOT_FOUND.
func (s *Store) DeleteKernelSession(ctx context.Context, owner *posternv1.Principal, agent, id string) error {
	return s.write(ctx, "forget a session", func(tx handle) error {
		n, err := tx.exec(ctx, "DELETE FROM kernel_sessions WHERE organization = ? AND agent = ? AND token = ? AND id = ?", owner.Organization, agent, owner.TokenId, plainText(id))
		if err == nil && n == 0 {
			err = notFound("session", id)
		}
		return err
	})
}
