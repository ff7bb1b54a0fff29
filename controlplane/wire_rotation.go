package main

import (
	"context"
	"math/rand/v2"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/api"
	"github.com/postern-dev/postern/controlplane/hub"
	"github.com/postern-dev/postern/controlplane/pki"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// The rotation of the certificate authority. Each step is one statement in the store, and any control
// plane of the installation takes the next one when it is due.

const (
	// caSettle is how long a new authority is announced before it issues, and caTick how often each
	// control plane reads the authorities: so each of them knows the new one before any issues with it.
	caSettle, caTick = 10 * time.Second, 2 * time.Second
	// Keys made until 2*caTick after the announcement may have the old one's fingerprint: another
	// control plane may have made them.

	// movesPerSecond bounds how many agents are asked to come back in a second, and moveWithin is
	// the least time over which they are spread.
	movesPerSecond, moveWithin = 100, 2 * time.Second
	// listBehind is how many agents a report lists, and moveAtOnce how many are asked in a round.
	listBehind, moveAtOnce = 1000, 10_000
)

// rotation rotates the certificate authority.
type rotation struct{ server *Server }

var _ api.Rotation = rotation{}

// Status implements api.Rotation.
func (r rotation) Status(ctx context.Context) (*posternv1.CAStatus, error) {
	s := r.server
	if err := s.ca.Reload(ctx); err != nil {
		return nil, err
	}
	at := s.ca.Rotation()
	out := &posternv1.CAStatus{Stage: at.Stage}
	var err error
	if out.Authorities, err = s.ca.Authorities(ctx); err != nil {
		return nil, err
	}
	switch at.Stage {
	case pki.StageAnnounced:
		out.TakesOver = timestamppb.New(at.Since.Add(s.caSettle()))
		fallthrough
	case pki.StageRenewing:
		now := time.Now()
		target := at.Active
		if at.Next != "" {
			target = at.Next
		}
		if out.Behind, out.BehindTotal, err = s.store.AgentsBehind(ctx, target, now.Add(-s.ca.Grace()), listBehind); err != nil {
			return nil, err
		}
		for _, agent := range out.Behind {
			_, err := s.hub.Agent(agent.AgentId)
			agent.Online = err == nil
		}
		if out.Keys, err = s.store.UsableKeysBefore(ctx, at.Since.Add(2*caTick), now); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// Rotate implements api.Rotation.
func (r rotation) Rotate(ctx context.Context, force bool) (*posternv1.CAStatus, error) {
	s := r.server
	if err := s.ca.Reload(ctx); err != nil {
		return nil, err
	}
	switch at := s.ca.Rotation(); {
	case force && at.Stage == pki.StageRenewing:
		if err := s.ca.Retire(ctx, at.Old); err != nil {
			return nil, err
		}
	case force:
		return nil, proto.Errorf(proto.CodeInvalid, "there is no old certificate authority to drop: --force ends a rotation in which the new one issues already (postern ca status)")
	case at.Stage == pki.StageStable:
		if err := s.ca.Announce(ctx); err != nil && proto.CodeOf(err) != proto.CodeAlreadyExists {
			return nil, err
		}
	}
	return r.Status(ctx)
}

func (s *Server) caSettle() time.Duration {
	if s.options.CASettle > 0 {
		return s.options.CASettle
	}
	return caSettle
}

// followCA takes rotations further until ctx ends.
func (s *Server) followCA(ctx context.Context) {
	tick := time.NewTicker(caTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := s.stepCA(ctx, time.Now()); err != nil && ctx.Err() == nil {
			s.log.Warn("rotation of the certificate authority not taken further", "err", err)
		}
	}
}

// stepCA takes the step that is due, if any.
func (s *Server) stepCA(ctx context.Context, now time.Time) error {
	if err := s.ca.Reload(ctx); err != nil {
		return err
	}
	at := s.ca.Rotation()
	switch at.Stage {
	case pki.StageAnnounced:
		if now.Before(at.Since.Add(s.caSettle())) {
			return nil
		}
		if err := s.ca.Activate(ctx, at.Next); err != nil {
			return err
		}
		s.log.Info("the new certificate authority issues from now on", "authority", at.Next)
		return s.noteCA(ctx, now, "ca.activate", at.Next)
	case pki.StageRenewing:
		agents, total, err := s.store.AgentsBehind(ctx, at.Active, now.Add(-s.ca.Grace()), moveAtOnce)
		if err != nil {
			return err
		}
		if total > 0 {
			s.moveBehind(agents)
			return nil
		}
		if keys, err := s.store.UsableKeysBefore(ctx, at.Since.Add(2*caTick), now); err != nil || keys > 0 {
			return err
		}
		if err := s.ca.Retire(ctx, at.Old); err != nil {
			return err
		}
		s.log.Info("the old certificate authority is dropped: nobody depends on it", "authority", at.Old)
		return s.noteCA(ctx, now, "ca.retire", at.Old)
	}
	return nil
}

// moveBehind has agents come back, each once on its tunnel: they are told to renew then.
func (s *Server) moveBehind(agents []*posternv1.AgentOfAuthority) {
	within := max(moveWithin, time.Duration(len(agents))*time.Second/movesPerSecond)
	for _, agent := range agents {
		s.hub.Move(agent.AgentId, rand.N(within), "the certificate authority is being replaced")
	}
}

func (s *Server) noteCA(ctx context.Context, now time.Time, action, fingerprint string) error {
	return s.audit.Append(ctx, auditchain.Entry{
		Time: now, Organization: store.DefaultOrganizationID, Actor: "control plane", Action: action, Target: "certificate authority " + fingerprint, Outcome: "done",
	})
}

// outdated reports whether an agent's certificate is of an authority that goes.
func (s *Server) outdated(ctx context.Context, id hub.Identity) bool {
	at := s.ca.Rotation()
	if at.Stage != pki.StageRenewing {
		return false
	}
	authority, err := s.store.CertificateAuthority(ctx, id.Serial)
	if err != nil && ctx.Err() == nil {
		s.log.Warn("authority of an agent's certificate not read", "agent_id", id.Agent, "err", err)
	}
	return err == nil && authority != at.Active
}
