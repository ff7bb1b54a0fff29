package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	posternproto "github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// maxLinkEvents is how many changes of its link are kept of an agent.
const maxLinkEvents = 20

const agentColumns = `a.id, a.name, a.labels, a.software, a.hostname, a.os, a.arch, a.kernel, a.remote_address,
	a.registered, a.last_seen, a.revoked, a.inventory,
	(SELECT max(c.not_after) FROM agent_certificates c WHERE c.agent = a.id AND c.state <> 'retired')`

type agentRow struct {
	a                              posternv1.Agent
	labels                         string
	registered                     int64
	lastSeen, revoked, certificate sql.NullInt64
	inventory                      []byte
}

func (r *agentRow) into() []any {
	return []any{
		&r.a.Id, &r.a.Name, &r.labels, &r.a.Software, &r.a.Hostname, &r.a.Os, &r.a.Arch, &r.a.Kernel, &r.a.RemoteAddress,
		&r.registered, &r.lastSeen, &r.revoked, &r.inventory, &r.certificate,
	}
}

func (r *agentRow) value() (*posternv1.Agent, error) {
	var err error
	if r.a.Labels, err = decodeLabels(r.labels); err != nil {
		return nil, err
	}
	var inventory posternv1.UpdateInventoryRequest
	if err := proto.Unmarshal(r.inventory, &inventory); err != nil {
		return nil, fmt.Errorf("inventory of agent %s in the store: %w", r.a.Id, err)
	}
	r.a.Sources = inventory.Sources
	r.a.Registered, r.a.LastSeen, r.a.Revoked = stamp(r.registered), stampOrNil(r.lastSeen), stampOrNil(r.revoked)
	r.a.CertificateExpires = stampOrNil(r.certificate)
	return &r.a, nil
}

// FindAgent finds an agent by id, or by name among those not revoked, without
// its link events. online and round_trip are for the hub to fill in.
func (s *Store) FindAgent(ctx context.Context, org, idOrName string) (*posternv1.Agent, error) {
	var r agentRow
	err := s.reader().row(ctx, "SELECT "+agentColumns+` FROM agents a
		WHERE a.organization = ? AND (a.id = ? OR (a.name = ? AND a.revoked IS NULL))`,
		org, plainText(idOrName), plainText(idOrName)).Scan(r.into()...)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, notFound("agent", idOrName)
	}
	if err != nil {
		return nil, s.fail(ctx, "find agent", err)
	}
	return r.value()
}

// GetAgent is FindAgent with the agent's link events, newest first.
func (s *Store) GetAgent(ctx context.Context, org, idOrName string) (*posternv1.Agent, error) {
	a, err := s.FindAgent(ctx, org, idOrName)
	if err != nil {
		return nil, err
	}
	rows, err := s.reader().query(ctx, "SELECT time, state, cause FROM link_events WHERE agent = ? ORDER BY sequence DESC", a.Id)
	a.LinkEvents, err = collect(ctx, s, "list link events", rows, err, func(rows *sql.Rows) (*posternv1.LinkEvent, error) {
		var e posternv1.LinkEvent
		var at int64
		err := rows.Scan(&at, &e.State, &e.Cause)
		e.Time = stamp(at)
		return &e, err
	})
	return a, err
}

// ListAgents lists an organization's agents that are not revoked, by name and
// without link events.
func (s *Store) ListAgents(ctx context.Context, org string) ([]*posternv1.Agent, error) {
	rows, err := s.reader().query(ctx, "SELECT "+agentColumns+" FROM agents a WHERE a.organization = ? AND a.revoked IS NULL ORDER BY a.name", org)
	return collect(ctx, s, "list agents", rows, err, func(rows *sql.Rows) (*posternv1.Agent, error) {
		var r agentRow
		if err := rows.Scan(r.into()...); err != nil {
			return nil, err
		}
		return r.value()
	})
}

// SetAgentHello records what an agent says of itself when its tunnel comes up:
// a.Id names it; software, host facts, sources and, unless empty, the remote
// address are taken.
func (s *Store) SetAgentHello(ctx context.Context, org string, a *posternv1.Agent, now time.Time) error {
	inventory, err := encodeInventory(a.Sources)
	if err != nil {
		return err
	}
	return s.writeRelaxed(ctx, "record an agent's facts", func(tx handle) error {
		n, err := tx.exec(ctx, `UPDATE agents SET software = ?, hostname = ?, os = ?, arch = ?, kernel = ?,
			remote_address = coalesce(nullif(?, ''), remote_address), inventory = ?, last_seen = ?
			WHERE id = ? AND organization = ?`,
			plainText(a.Software), plainText(a.Hostname), plainText(a.Os), plainText(a.Arch), plainText(a.Kernel), plainText(a.RemoteAddress),
			inventory, millis(now), a.Id, org)
		if err == nil && n == 0 {
			return notFound("agent", a.Id)
		}
		return err
	})
}

// SetAgentSources replaces an agent's inventory.
func (s *Store) SetAgentSources(ctx context.Context, org, agent string, sources []*posternv1.SourceInfo) error {
	inventory, err := encodeInventory(sources)
	if err != nil {
		return err
	}
	return s.writeRelaxed(ctx, "record an agent's inventory", func(tx handle) error {
		n, err := tx.exec(ctx, "UPDATE agents SET inventory = ? WHERE id = ? AND organization = ?", inventory, agent, org)
		if err == nil && n == 0 {
			return notFound("agent", agent)
		}
		return err
	})
}

func encodeInventory(sources []*posternv1.SourceInfo) ([]byte, error) {
	inventory, err := proto.Marshal(&posternv1.UpdateInventoryRequest{Sources: sources})
	if err != nil {
		return nil, posternproto.Errorf(posternproto.CodeInvalid, "the inventory cannot be encoded: %w", err)
	}
	return inventory, nil
}

// touchBatch is how many agents one statement touches.
const touchBatch = 500

// TouchAgents records that these agents, of whatever organization, are there.
func (s *Store) TouchAgents(ctx context.Context, agents []string, now time.Time) error {
	for len(agents) > 0 {
		batch := agents[:min(len(agents), touchBatch)]
		agents = agents[len(batch):]
		args := []any{millis(now)}
		for _, id := range batch {
			args = append(args, id)
		}
		if err := s.writeRelaxed(ctx, "record agents' presence", func(tx handle) error {
			_, err := tx.exec(ctx, "UPDATE agents SET last_seen = ? WHERE id IN ("+placeholders(len(batch))+")", args...)
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// AppendLinkEvent records a change of an agent's link and forgets all but the
// newest 20.
func (s *Store) AppendLinkEvent(ctx context.Context, org, agent string, e *posternv1.LinkEvent) error {
	return s.writeRelaxed(ctx, "record a link event", func(tx handle) error {
		var last int64
		// Takes the agent's row, so that two control planes do not take one number.
		n, err := tx.exec(ctx, "UPDATE agents SET last_seen = coalesce(last_seen, ?) WHERE id = ? AND organization = ?", millis(e.Time.AsTime()), agent, org)
		if err != nil {
			return err
		}
		if n == 0 {
			return notFound("agent", agent)
		}
		if err := tx.row(ctx, "SELECT coalesce(max(sequence), 0) FROM link_events WHERE agent = ?", agent).Scan(&last); err != nil {
			return err
		}
		if _, err := tx.exec(ctx, "INSERT INTO link_events (agent, sequence, time, state, cause) VALUES (?, ?, ?, ?, ?)",
			agent, last+1, millis(e.Time.AsTime()), plainText(e.State), plainText(clip(e.Cause))); err != nil {
			return err
		}
		_, err = tx.exec(ctx, "DELETE FROM link_events WHERE agent = ? AND sequence <= ?", agent, last+1-maxLinkEvents)
		return err
	})
}

// RevokeAgent revokes an agent, found by id, or by name among those not revoked,
// and with it its certificates. Revoking it again changes nothing. Its name is
// free from then on.
func (s *Store) RevokeAgent(ctx context.Context, org, idOrName string, now time.Time) (*posternv1.Agent, error) {
	var id string
	err := s.write(ctx, "revoke agent", func(tx handle) error {
		err := tx.row(ctx, `UPDATE agents SET revoked = coalesce(revoked, ?)
			WHERE organization = ? AND (id = ? OR (name = ? AND revoked IS NULL)) RETURNING id`,
			millis(now), org, plainText(idOrName), plainText(idOrName)).Scan(&id)
		if errors.Is(err, sql.ErrNoRows) {
			return notFound("agent", idOrName)
		}
		if err != nil {
			return err
		}
		return keepCatalogs(ctx, tx, id, nil)
	})
	if err != nil {
		return nil, err
	}
	return s.FindAgent(ctx, org, id)
}

// CutSince lists the agents that were revoked and the organizations that were
// disabled at or after since, on any control plane: their tunnels must go. Ask
// with some overlap, since the control planes' clocks differ.
func (s *Store) CutSince(ctx context.Context, since time.Time) (agents, organizations []string, err error) {
	scan := func(rows *sql.Rows) (string, error) {
		var id string
		err := rows.Scan(&id)
		return id, err
	}
	rows, err := s.reader().query(ctx, "SELECT id FROM agents WHERE revoked IS NOT NULL AND revoked >= ?", millis(since))
	if agents, err = collect(ctx, s, "list revoked agents", rows, err, scan); err != nil {
		return nil, nil, err
	}
	rows, err = s.reader().query(ctx, "SELECT id FROM organizations WHERE disabled >= ?", millis(since))
	organizations, err = collect(ctx, s, "list disabled organizations", rows, err, scan)
	return agents, organizations, err
}
