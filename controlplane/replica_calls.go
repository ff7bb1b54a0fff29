package main

import (
	"context"
	"encoding/json"
	"maps"
	"slices"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/controlplane/hub"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// The calls between replicas, JSON both ways.
const (
	callCancelQuery = "cancel-query"
	callCancelKey   = "cancel-key"
	callReportRows  = "report-rows"
	callMove        = "move-agent"
	callMasterKey   = "master-key"
	// callMasterTrouble asks for a masterTrouble.
	callMasterTrouble = "master-key-trouble"
)

// moveCall asks for an agent to be moved that has this tunnel.
type moveCall struct {
	Agent      string
	Generation int64
}

// keyCall asks for a master key; keyAnswer has it.
type (
	keyCall   struct{ ID string }
	keyAnswer struct{ Key []byte }
)

// bases are where the others that live are reached.
func (r *replicas) bases() []string {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Collect(maps.Values(r.alive))
}

// masterKey asks another control plane for a master key.
func (r *replicas) masterKey(ctx context.Context, base, id string) ([]byte, error) {
	body, err := json.Marshal(keyCall{id})
	if err != nil {
		return nil, err
	}
	answer, err := r.client.Call(ctx, base, callMasterKey, body)
	if err != nil {
		return nil, err
	}
	defer clear(answer)
	var got keyAnswer
	if json.Unmarshal(answer, &got) != nil {
		return nil, proto.Errorf(proto.CodeInternal, "the other control plane's answer is malformed") // which is not quoted
	}
	return got.Key, nil
}

// queryCall asks about a query; Principal and Rows are encoded messages.
type queryCall struct {
	Organization, Agent, Query string
	Principal, Rows            []byte
}

// found is the answer: whether there was what was asked for.
type found struct{ Found bool }

// cancelQuery cancels a query that runs at another replica. That the caller may do
// so has been decided.
func (r *replicas) cancelQuery(ctx context.Context, by *posternv1.Principal, id string) (bool, error) {
	if r == nil {
		return false, nil
	}
	name, err := r.server.store.RunningAt(ctx, by.Organization, id)
	if err != nil || name == "" || name == r.server.replica {
		return false, err
	}
	base := r.urlOf(name)
	if base == "" {
		return true, proto.Errorf(proto.CodeUnavailable, "the control plane's replica that runs query %s is lost; its host cancels the query in the database", id)
	}
	principal, err := gproto.Marshal(by)
	if err != nil {
		return true, err
	}
	return r.ask(ctx, base, callCancelQuery, queryCall{Query: id, Principal: principal})
}

// reportRows passes an agent's report on to the replica that asked for the query; found
// is false if that is not another one.
func (r *replicas) reportRows(ctx context.Context, id hub.Identity, query string, rows *posternv1.KeptRows) (bool, error) {
	if r == nil {
		return false, nil
	}
	name, err := r.server.store.AskedBy(ctx, id.Organization, query)
	base := ""
	if err == nil && name != r.server.replica {
		base = r.urlOf(name)
	}
	if err != nil || base == "" {
		return err != nil, err
	}
	encoded, err := gproto.Marshal(rows)
	if err != nil {
		return true, proto.Errorf(proto.CodeInvalid, "the rows cannot be encoded: %w", err)
	}
	_, err = r.ask(ctx, base, callReportRows, queryCall{Organization: id.Organization, Agent: id.Agent, Query: query, Rows: encoded})
	return true, err
}

// cancelKey passes a cancel request of PostgreSQL's protocol to all others.
func (r *replicas) cancelKey(ctx context.Context, rest []byte) bool {
	if r == nil {
		return false
	}
	r.mu.Lock()
	bases := make([]string, 0, len(r.alive))
	for _, base := range r.alive {
		bases = append(bases, base)
	}
	r.mu.Unlock()
	results := make(chan bool, len(bases))
	for _, base := range bases {
		go func() {
			ok, err := r.ask(ctx, base, callCancelKey, rest)
			results <- ok && err == nil
		}()
	}
	any := false
	for range bases {
		any = <-results || any
	}
	return any
}

func (r *replicas) ask(ctx context.Context, base, name string, question any) (bool, error) {
	body, err := json.Marshal(question)
	if err != nil {
		return false, err
	}
	answer, err := r.client.Call(ctx, base, name, body)
	if err != nil {
		return false, err
	}
	var f found
	err = json.Unmarshal(answer, &f)
	return f.Found, err
}

// call answers another replica.
func (r *replicas) call(ctx context.Context, name string, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	s := r.server
	bad := func(err error) ([]byte, error) {
		return nil, proto.Errorf(proto.CodeInvalid, "call %s: %w", name, err)
	}
	var f found
	var err error
	switch name {
	case callCancelQuery, callReportRows:
		var q queryCall
		if err := json.Unmarshal(body, &q); err != nil {
			return bad(err)
		}
		if name == callReportRows {
			rows := &posternv1.KeptRows{}
			if err := gproto.Unmarshal(q.Rows, rows); err != nil {
				return bad(err)
			}
			f.Found, err = true, s.queries.ReportRows(ctx, q.Organization, q.Agent, q.Query, rows)
			break
		}
		by := &posternv1.Principal{}
		if err := gproto.Unmarshal(q.Principal, by); err != nil {
			return bad(err)
		}
		f.Found, err = queries{s.queries, s.journal, nil}.cancelHere(ctx, by, q.Query)
	case callMove:
		var m moveCall
		if err := json.Unmarshal(body, &m); err != nil {
			return bad(err)
		}
		s.hub.MoveGeneration(m.Agent, m.Generation)
	case callMasterKey:
		var q keyCall
		if err := json.Unmarshal(body, &q); err != nil {
			return bad(err)
		}
		key, err := s.masters.give(ctx, q.ID)
		if err != nil {
			return nil, err
		}
		return json.Marshal(keyAnswer{key})
	case callMasterTrouble:
		return json.Marshal(s.masters.sight.told())
	case callCancelKey:
		var rest []byte
		if err := json.Unmarshal(body, &rest); err != nil {
			return bad(err)
		}
		f.Found = s.pg.CancelKey(ctx, rest)
	default:
		return nil, proto.Errorf(proto.CodeNotFound, "no such call: %q: are all replicas of one version?", name)
	}
	if err != nil {
		return nil, err
	}
	return json.Marshal(f)
}
