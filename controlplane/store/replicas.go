package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"database/sql/driver"
	"encoding/binary"
	"errors"
	"strings"
	"time"
)

// Replica is a control plane that shares this store.
type Replica struct {
	// Name is its Config.Replica.
	Name string
	// URL is where the others reach it, https://HOST:PORT.
	URL string
	// Beat counts up while it lives. What it says is compared with what it said
	// before, by the reader's own clock: the replicas' clocks need not agree.
	Beat int64
	// Draining is set while it stops.
	Draining bool
	Started  time.Time
	Software string
	// MasterKeys are the ids of the master keys that it has on its disk, MasterActive is the one with which it
	// seals. Both are empty for a version that knows but one key.
	MasterKeys   []string
	MasterActive string
}

// Link says which replica has an agent's tunnel.
type Link struct {
	// Agent and Organization are ids, Name is the agent's name.
	Agent, Organization, Name string
	// Generation counts the agent's tunnels from 1.
	Generation int64
	// Replica is Replica.Name, URL its URL; both empty: the agent has no tunnel.
	Replica, URL string
	// Tunnel is the tunnel's id in hex.
	Tunnel   string
	Attached time.Time
}

// BeatReplica records that this replica lives: Name is ignored, Config.Replica
// counts; Beat and, but for the first time, Started are ignored too. It waits for no disk.
func (s *Store) BeatReplica(ctx context.Context, r Replica) error {
	return s.writeRelaxed(ctx, "record this replica's heartbeat", func(tx handle) error {
		_, err := tx.exec(ctx, `INSERT INTO replicas (name, url, beat, draining, started, software, master_keys, master_active) VALUES (?, ?, 1, ?, ?, ?, ?, ?)
			ON CONFLICT (name) DO UPDATE SET url = excluded.url, beat = replicas.beat + 1, draining = excluded.draining,
			started = excluded.started, software = excluded.software, master_keys = excluded.master_keys, master_active = excluded.master_active`,
			s.replica, r.URL, boolInt(r.Draining), millis(r.Started), r.Software, strings.Join(r.MasterKeys, " "), r.MasterActive)
		return err
	})
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Replicas are all that said so and did not say goodbye, dead ones included, by name.
func (s *Store) Replicas(ctx context.Context) ([]Replica, error) {
	rows, err := s.reader().query(ctx, "SELECT name, url, beat, draining, started, software, master_keys, master_active FROM replicas ORDER BY name")
	return collect(ctx, s, "list replicas", rows, err, func(rows *sql.Rows) (Replica, error) {
		var r Replica
		var draining, started int64
		var keys string
		err := rows.Scan(&r.Name, &r.URL, &r.Beat, &draining, &started, &r.Software, &keys, &r.MasterActive)
		r.MasterKeys = strings.Fields(keys)
		r.Draining, r.Started = draining != 0, time.UnixMilli(started).UTC()
		return r, err
	})
}

// ForgetReplica removes a replica that has stopped or is dead, and says of no agent any
// more that its tunnel is there.
func (s *Store) ForgetReplica(ctx context.Context, name string) error {
	return s.write(ctx, "forget a replica", func(tx handle) error {
		if _, err := tx.exec(ctx, "UPDATE links SET replica = '' WHERE replica = ?", name); err != nil {
			return err
		}
		_, err := tx.exec(ctx, "DELETE FROM replicas WHERE name = ?", name)
		return err
	})
}

// AttachLink records that this replica has an agent's tunnel, whoever had one before,
// and returns its generation. It waits for no disk: after a power failure of the
// database all tunnels are gone anyway.
func (s *Store) AttachLink(ctx context.Context, agent, tunnel string, now time.Time) (generation int64, err error) {
	err = s.writeRelaxed(ctx, "record an agent's tunnel", func(tx handle) error {
		return tx.row(ctx, `INSERT INTO links (agent, generation, replica, tunnel, attached) VALUES (?, 1, ?, ?, ?)
			ON CONFLICT (agent) DO UPDATE SET generation = links.generation + 1, replica = excluded.replica,
			tunnel = excluded.tunnel, attached = excluded.attached RETURNING generation`,
			agent, s.replica, tunnel, millis(now)).Scan(&generation)
	})
	return generation, err
}

// DetachLink records that a tunnel has ended, unless the agent has a newer one.
func (s *Store) DetachLink(ctx context.Context, agent string, generation int64) error {
	return s.writeRelaxed(ctx, "record the end of an agent's tunnel", func(tx handle) error {
		_, err := tx.exec(ctx, "UPDATE links SET replica = '' WHERE agent = ? AND generation = ?", agent, generation)
		return err
	})
}

const linkColumns = `l.agent, a.organization, a.name, l.generation, l.replica, coalesce(r.url, ''), l.tunnel, l.attached
	FROM links l JOIN agents a ON a.id = l.agent LEFT JOIN replicas r ON r.name = l.replica AND l.replica <> ''`

// LinkOf says where an agent's tunnel is; NOT_FOUND if it never had one.
func (s *Store) LinkOf(ctx context.Context, agent string) (Link, error) {
	return s.link(ctx, "l.agent = ?", agent)
}

// LinkOfTunnel is LinkOf for the agent with this tunnel; NOT_FOUND if no agent has it.
func (s *Store) LinkOfTunnel(ctx context.Context, tunnel string) (Link, error) {
	return s.link(ctx, "l.tunnel = ? AND l.replica <> ''", tunnel)
}

func (s *Store) link(ctx context.Context, where, value string) (Link, error) {
	var l Link
	var attached int64
	err := s.reader().row(ctx, "SELECT "+linkColumns+" WHERE "+where, plainText(value)).
		Scan(&l.Agent, &l.Organization, &l.Name, &l.Generation, &l.Replica, &l.URL, &l.Tunnel, &attached)
	if errors.Is(err, sql.ErrNoRows) {
		return Link{}, notFound("link", value)
	}
	l.Attached = time.UnixMilli(attached).UTC()
	return l, s.fail(ctx, "find an agent's tunnel", err)
}

// LinksOfReplica are the generations of the tunnels that a replica has, by agent.
func (s *Store) LinksOfReplica(ctx context.Context, replica string) (map[string]int64, error) {
	return s.generations(ctx, "SELECT agent, generation FROM links WHERE replica = ?", replica)
}

// Generations are those of these agents' tunnels, 0 for an agent without one. There
// may be up to 1000.
func (s *Store) Generations(ctx context.Context, agents []string) (map[string]int64, error) {
	if len(agents) == 0 {
		return map[string]int64{}, nil
	}
	args := make([]any, len(agents))
	for i, id := range agents {
		args[i] = id
	}
	return s.generations(ctx, "SELECT agent, CASE WHEN replica = '' THEN 0 ELSE generation END FROM links WHERE agent IN ("+placeholders(len(args))+")", args...)
}

func (s *Store) generations(ctx context.Context, query string, args ...any) (map[string]int64, error) {
	all := map[string]int64{}
	rows, err := s.reader().query(ctx, query, args...)
	_, err = collect(ctx, s, "list tunnels", rows, err, func(rows *sql.Rows) (struct{}, error) {
		var agent string
		var generation int64
		err := rows.Scan(&agent, &generation)
		all[agent] = generation
		return struct{}{}, err
	})
	return all, err
}

// Exclusively runs f unless another control plane on this database runs something under
// the same name; ran tells. The database takes the right back when this process
// dies. With SQLite there is no other control plane.
func (s *Store) Exclusively(ctx context.Context, name string, f func(context.Context) error) (ran bool, err error) {
	if s.engine == sqlite {
		return true, f(ctx)
	}
	conn, err := s.read.Conn(ctx)
	if err != nil {
		return false, s.fail(ctx, "take the lease "+name, err)
	}
	defer func() { _ = conn.Close() }()
	sum := sha256.Sum256([]byte("postern lease: " + name))
	key := int64(binary.BigEndian.Uint64(sum[:]))
	if err := conn.QueryRowContext(ctx, "SELECT pg_try_advisory_lock($1)", key).Scan(&ran); err != nil || !ran {
		return false, s.fail(ctx, "take the lease "+name, err)
	}
	defer func() {
		if _, err := conn.ExecContext(context.WithoutCancel(ctx), "SELECT pg_advisory_unlock($1)", key); err != nil {
			// A connection that keeps the lock must not go back to the pool.
			_ = conn.Raw(func(any) error { return driver.ErrBadConn })
		}
	}()
	return true, f(ctx)
}

// RunningAt is the replica that runs a query of the history;
// empty if it does not run.
func (s *Store) RunningAt(ctx context.Context, organization, id string) (replica string, err error) {
	err = s.reader().row(ctx, `SELECT replica FROM queries WHERE organization = ? AND id = ? AND state = 'running'
		UNION ALL SELECT replica FROM wire_queries WHERE organization = ? AND id = ? AND state = 'running'`,
		organization, plainText(id), organization, plainText(id)).Scan(&replica)
	if errors.Is(err, sql.ErrNoRows) {
		return "", nil
	}
	return replica, s.fail(ctx, "find a running query", err)
}

// AskedBy is the replica that was asked to run a query of the organization's history,
// however it stands now; empty if there is none.
func (s *Store) AskedBy(ctx context.Context, organization, id string) (replica string, err error) {
	err = s.reader().row(ctx, "SELECT replica FROM queries WHERE organization = ? AND id = ?", organization, plainText(id)).Scan(&replica)
	if errors.Is(err, sql.ErrNoRows) {
		return "", nil
	}
	return replica, s.fail(ctx, "find a query", err)
}

// ReclaimLink records again that this replica has a tunnel, which another one has taken
// it for dead over; false if the agent has a newer tunnel.
func (s *Store) ReclaimLink(ctx context.Context, agent string, generation int64) (bool, error) {
	var n int64
	err := s.writeRelaxed(ctx, "record an agent's tunnel again", func(tx handle) (err error) {
		n, err = tx.exec(ctx, "UPDATE links SET replica = ? WHERE agent = ? AND generation = ?", s.replica, agent, generation)
		return err
	})
	return n > 0, err
}

// OnlineElsewhere are the agents of an organization whose tunnels are at one of these
// replicas.
func (s *Store) OnlineElsewhere(ctx context.Context, organization string, replicas []string) (map[string]bool, error) {
	all := map[string]bool{}
	if len(replicas) == 0 {
		return all, nil
	}
	args := []any{organization}
	for _, name := range replicas {
		args = append(args, name)
	}
	rows, err := s.reader().query(ctx, "SELECT l.agent FROM links l JOIN agents a ON a.id = l.agent WHERE a.organization = ? AND l.replica IN ("+placeholders(len(replicas))+")", args...)
	_, err = collect(ctx, s, "list tunnels at other replicas", rows, err, func(rows *sql.Rows) (struct{}, error) {
		var agent string
		err := rows.Scan(&agent)
		all[agent] = true
		return struct{}{}, err
	})
	return all, err
}
