package registration

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// maxSources bounds an agent's inventory.
const maxSources = 1000

// Hello notes what an agent says of itself when its tunnel comes up, and returns
// its name, its organization's name, the authorities and the newest head of its
// audit chain that was known before; versions and features are the caller's. An
// agent whose chain has lost or changed entries is served all the same, but the
// organization's log says so.
func (s *Service) Hello(ctx context.Context, id Identity, req *posternv1.HelloRequest) (*posternv1.HelloResponse, error) {
	if len(req.Sources) > maxSources {
		return nil, proto.Errorf(proto.CodeInvalid, "the host declares %d data sources, more than %d", len(req.Sources), maxSources)
	}
	head, err := auditchain.HeadFromProto(req.AuditHead)
	if err != nil {
		return nil, proto.Errorf(proto.CodeInvalid, "hello: %w", err)
	}
	agent, err := s.cfg.Store.FindAgent(ctx, id.Organization, id.Agent)
	if err != nil {
		return nil, err
	}
	org, err := s.cfg.Store.GetOrganization(ctx, id.Organization)
	if err != nil {
		return nil, err
	}
	known, err := s.noteHead(ctx, id, agent.Name, head)
	if err != nil {
		return nil, err
	}
	now := s.cfg.Now()
	said := &posternv1.Agent{Id: id.Agent, Software: clip(req.Version.GetSoftware(), maxFact), Sources: req.Sources}
	setFacts(said, req.Host)
	if err := s.cfg.Store.SetAgentHello(ctx, id.Organization, said, now); err != nil {
		return nil, err
	}
	return &posternv1.HelloResponse{
		AgentId: id.Agent, Name: agent.Name, Organization: org.Name, ServerTime: timestamppb.New(now),
		KnownAuditHead: known.Proto(), Authorities: s.cfg.CA.Certificates(),
	}, nil
}

// noteHead compares the head that an agent reports with the newest known one and
// keeps it if it is newer.
func (s *Service) noteHead(ctx context.Context, id Identity, name string, head auditchain.Head) (auditchain.Head, error) {
	known, err := s.cfg.Store.AgentAuditHead(ctx, id.Agent)
	if err != nil {
		return known, err
	}
	wrong := ""
	switch {
	case head.Sequence < known.Sequence:
		wrong = fmt.Sprintf("the host's audit chain ends at entry %d, but had reached %d: entries were removed", head.Sequence, known.Sequence)
	case head.Sequence == known.Sequence && head != known:
		wrong = fmt.Sprintf("entry %d of the host's audit chain is not the one reported before: it was altered", head.Sequence)
	}
	if wrong != "" {
		s.log.WarnContext(ctx, "agent's audit chain broken", "agent", name, "err", wrong)
		if s.checks.alarmDue("chain "+id.Agent, s.cfg.Now()) {
			s.audit(ctx, auditchain.Entry{
				Organization: id.Organization, Actor: "agent " + name, Action: "audit.mismatch", Agent: name, Outcome: "failed", Error: wrong,
			})
		}
		return known, nil
	}
	if head.Sequence > known.Sequence {
		_, err = s.cfg.Store.SetAgentAuditHead(ctx, id.Agent, head)
	}
	return known, err
}

// UpdateInventory replaces what Hello said of the data sources.
func (s *Service) UpdateInventory(ctx context.Context, id Identity, sources []*posternv1.SourceInfo) error {
	if len(sources) > maxSources {
		return proto.Errorf(proto.CodeInvalid, "the host declares %d data sources, more than %d", len(sources), maxSources)
	}
	return s.cfg.Store.SetAgentSources(ctx, id.Organization, id.Agent, sources)
}
