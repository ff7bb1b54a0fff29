package registration

import (
	"context"
	"crypto/sha256"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Renew trades a certificate, whose key the handshake proved, for a new one with
// a new key. It serves both LinkService.Renew and Rejoin: a certificate within
// the grace period after its end will do. The old one works until the new one has
// been used. AGENT_REVOKED, ORGANIZATION_DISABLED, UNAUTHENTICATED for a retired
// certificate, CLOCK_SKEW and INVALID change nothing.
func (s *Service) Renew(ctx context.Context, id Identity, req *posternv1.RenewRequest, remote string) (*posternv1.RenewResponse, error) {
	if err := s.CheckIdentity(ctx, id); err != nil {
		return nil, err
	}
	if exhausted(s.cfg.Renewals, id.Agent) {
		return nil, proto.Errorf(proto.CodeRateLimited, "the agent has renewed its certificate too often of late: try again in a minute")
	}
	take(s.cfg.Renewals, id.Agent)
	now := s.cfg.Now()
	if err := s.checkClock(req.HostTime, now); err != nil {
		return nil, err
	}
	agent, err := s.cfg.Store.FindAgent(ctx, id.Organization, id.Agent)
	if err != nil {
		return nil, err
	}
	certificate, err := s.cfg.CA.IssueAgent(req.Csr, id.Organization, id.Agent, now)
	if err != nil {
		return nil, err
	}
	serial := serialText(certificate.SerialNumber)
	err = s.cfg.Store.InsertCertificate(ctx, id.Organization, id.Agent, serial, s.issuer(certificate),
		sha256.Sum256(certificate.RawSubjectPublicKeyInfo), certificate.NotAfter, now, now.Add(-s.cfg.Grace))
	if err != nil {
		return nil, err
	}
	action := "agent.renew"
	if id.Expired {
		action = "agent.rejoin"
	}
	s.audit(ctx, auditchain.Entry{
		Organization: id.Organization, Actor: "agent " + agent.Name, Action: action, Target: "certificate " + serial,
		Agent: agent.Name, Outcome: "done", Remote: remote,
	})
	s.log.InfoContext(ctx, "agent's certificate renewed", "agent", agent.Name, "agent_id", agent.Id, "expired", id.Expired)
	return &posternv1.RenewResponse{Certificate: certificate.Raw, Authorities: s.cfg.CA.Certificates()}, nil
}
