package main

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/postern-dev/postern/controlplane/hub"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// closeSessionsTime bounds the request to one agent.
	closeSessionsTime = 10 * time.Second
	// closersAtOnce is how many agents are asked at a time; others wait.
	closersAtOnce = 32
)

// sessionCloser ends the SQL sessions of tokens that were revoked, and cuts their kernels
// off from data sources, on the agents
// whose tunnels end here: on all of them when a token is revoked, and on one that
// comes back, which may have missed it.
type sessionCloser struct {
	store  *store.Store
	agents func(id string) (liveAgent, error)
	log    *slog.Logger
	ctx    context.Context
	stop   context.CancelFunc
	wg     sync.WaitGroup
	places chan struct{}

	mu   sync.Mutex
	done map[string]time.Time // tokens that were dealt with, by id
	// expected are the agents, by id, that said in their hello that they have sessions.
	expected map[string]bool
	closed   bool
}

func newSessionCloser(s *store.Store, agents func(id string) (liveAgent, error), log *slog.Logger) *sessionCloser {
	ctx, stop := context.WithCancel(context.Background())
	return &sessionCloser{store: s, agents: agents, log: log, ctx: ctx, stop: stop, places: make(chan struct{}, closersAtOnce), done: make(map[string]time.Time), expected: make(map[string]bool)}
}

// close ends what is under way.
func (c *sessionCloser) close() {
	c.stop()
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.wg.Wait()
}

// revoked ends the sessions of tokens that were revoked since a time. It may be
// told of the same ones again.
func (c *sessionCloser) revoked(ctx context.Context, since time.Time, tokens []store.TokenOwner) error {
	c.mu.Lock()
	for id, at := range c.done {
		if at.Before(since.Add(-time.Minute)) {
			delete(c.done, id)
		}
	}
	var fresh []store.TokenOwner
	for _, t := range tokens {
		if _, ok := c.done[t.Token]; !ok {
			c.done[t.Token] = time.Now()
			fresh = append(fresh, t)
		}
	}
	c.mu.Unlock()
	for _, t := range fresh {
		agents, err := c.store.ListAgents(ctx, t.Organization)
		if err != nil {
			return err
		}
		for _, agent := range agents {
			if l, err := c.agents(agent.Id); err == nil {
				c.closeOn(l, agent.Name, t.Organization, t.Token)
			}
		}
	}
	return nil
}

func (c *sessionCloser) closeOn(l liveAgent, agent, organization, token string) {
	c.background(func(ctx context.Context) {
		_, err := l.CloseSession(ctx, &posternv1.CloseSessionRequest{
			Principal: &posternv1.Principal{Organization: organization, TokenId: token}, Reason: "its token was revoked", Revoked: true,
		})
		if err != nil && c.ctx.Err() == nil {
			c.log.Warn("sessions of a revoked token not closed: they end by their idle timeout", "agent", agent, "token", token, "err", err)
		}
	})
}

// background runs f with one of the places, bounded in time.
func (c *sessionCloser) background(f func(context.Context)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.wg.Go(func() {
		select {
		case c.places <- struct{}{}:
			defer func() { <-c.places }()
		case <-c.ctx.Done():
			return
		}
		ctx, cancel := context.WithTimeout(c.ctx, closeSessionsTime)
		defer cancel()
		f(ctx)
	})
}

// expect notes that an agent whose tunnel comes up has sessions.
func (c *sessionCloser) expect(agent string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expected[agent] = true
}

// came looks at the sessions of an agent whose tunnel came up, if it has any.
func (c *sessionCloser) came(id hub.Identity) {
	c.mu.Lock()
	expected := c.expected[id.Agent]
	delete(c.expected, id.Agent)
	c.mu.Unlock()
	if !expected {
		return
	}
	c.background(func(ctx context.Context) {
		l, err := c.agents(id.Agent)
		if err != nil {
			return // gone again
		}
		open, err := l.ListSessions(ctx, &posternv1.ListSessionsRequest{})
		if err != nil {
			return // an older agent has none
		}
		seen := map[string]bool{}
		owners := open.KernelOwners
		for _, s := range open.Sessions {
			owners = append(owners, s.Principal)
		}
		for _, p := range owners {
			token := p.GetTokenId()
			if seen[token] || p.GetOrganization() != id.Organization {
				continue
			}
			seen[token] = true
			_, t, _, err := c.store.TokenByID(ctx, token)
			gone := proto.CodeOf(err) == proto.CodeNotFound
			if gone || err == nil && (t.Revoked != nil || t.Expires != nil && t.Expires.AsTime().Before(time.Now())) {
				c.closeOn(l, id.Agent, id.Organization, token)
			}
		}
	})
}
