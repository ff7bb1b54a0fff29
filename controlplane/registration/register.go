package registration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/big"
	"regexp"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// What a host may say of itself, in bytes.
const maxFact = 256

var agentName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// Register trades a registration key for an identity. remote is the host's
// address as we see it. See the package's comment for the errors.
func (s *Service) Register(ctx context.Context, req *posternv1.RegisterRequest, remote string) (*posternv1.RegisterResponse, error) {
	from := addressKey(remote)
	if exhausted(s.cfg.Failures, from) {
		return nil, proto.Errorf(proto.CodeRateLimited, "too many failed attempts to join from %s: try again in a minute", from)
	}
	now := s.cfg.Now()
	org, key, err := s.openKey(ctx, req)
	if err != nil {
		if !uncertain(err) {
			take(s.cfg.Failures, from)
			s.log.WarnContext(ctx, "unknown registration key", "remote", remote)
		}
		return nil, err
	}
	agent, certificate, err := s.join(ctx, org, key, req, remote, now)
	if err != nil {
		if !uncertain(err) {
			// The secret was right, so this is worth an entry and cannot be made in
			// bulk by strangers; the limit is for a script gone wild.
			take(s.cfg.Failures, from)
			s.audit(ctx, auditchain.Entry{
				Organization: org.Id, Actor: "host", Action: "agent.register", Target: "key " + key.Id,
				Verdict: "denied", Outcome: "denied", Error: proto.Detail(err).Message, Remote: remote,
			})
		}
		return nil, err
	}
	s.audit(ctx, auditchain.Entry{
		Organization: org.Id, Actor: "agent " + agent.Name, Action: "agent.register", Target: "key " + key.Id,
		Agent: agent.Name, Outcome: "done", Remote: remote,
	})
	s.log.InfoContext(ctx, "agent registered", "agent", agent.Name, "agent_id", agent.Id, "organization", org.Name, "remote", remote)
	return &posternv1.RegisterResponse{
		AgentId: agent.Id, Name: agent.Name, Organization: org.Name, Labels: agent.Labels,
		Certificate: certificate, Authorities: s.cfg.CA.Certificates(),
	}, nil
}

// openKey finds the key and compares its secret. An unknown key and a wrong
// secret are the same error and take the same time.
func (s *Service) openKey(ctx context.Context, req *posternv1.RegisterRequest) (*posternv1.Organization, *posternv1.Key, error) {
	org, key, want, err := s.cfg.Store.KeyByID(ctx, clip(req.KeyId, 64))
	if err != nil && proto.CodeOf(err) != proto.CodeNotFound {
		return nil, nil, err
	}
	got := sha256.Sum256(req.KeySecret)
	if subtle.ConstantTimeCompare(got[:], want[:]) != 1 || err != nil {
		return nil, nil, proto.Errorf(proto.CodeKeyUnknown, "the control plane does not know this registration key: check that it was made here, or create another with `postern key create`")
	}
	return org, key, nil
}

// join does all that may fail before it takes a use of the key, and then that.
func (s *Service) join(ctx context.Context, org *posternv1.Organization, key *posternv1.Key, req *posternv1.RegisterRequest, remote string, now time.Time) (*posternv1.Agent, []byte, error) {
	if err := usable(org, key, now); err != nil {
		return nil, nil, err
	}
	if _, err := proto.Negotiate(req.Version); err != nil {
		return nil, nil, err
	}
	if err := s.checkClock(req.HostTime, now); err != nil {
		return nil, nil, err
	}
	if !agentName.MatchString(req.Name) {
		return nil, nil, proto.Errorf(proto.CodeInvalid, "agent name %q: use 1 to 63 of a-z, 0-9 and -, not at the ends; see --name", clip(req.Name, 80))
	}
	agent := &posternv1.Agent{
		Id: proto.NewID(proto.AgentPrefix), Name: req.Name, RemoteAddress: remote,
		Software: clip(req.Version.GetSoftware(), maxFact),
	}
	setFacts(agent, req.Host)
	certificate, err := s.cfg.CA.IssueAgent(req.Csr, org.Id, agent.Id, now)
	if err != nil {
		return nil, nil, err
	}
	err = s.cfg.Store.RegisterAgent(ctx, org.Id, key.Id, agent, serialText(certificate.SerialNumber), s.issuer(certificate),
		sha256.Sum256(certificate.RawSubjectPublicKeyInfo), certificate.NotAfter, now)
	if err != nil {
		return nil, nil, err
	}
	return agent, certificate.Raw, nil
}

// usable is the early check, with the better text; the store's statement decides.
func usable(org *posternv1.Organization, key *posternv1.Key, now time.Time) error {
	const another = "create another with `postern key create`"
	switch {
	case org.Disabled:
		return proto.Errorf(proto.CodeOrganizationDisabled, "organization %s is disabled: its hosts cannot join", org.Name)
	case key.Revoked != nil:
		return proto.Errorf(proto.CodeKeyRevoked, "the registration key was revoked on %s: %s", at(key.Revoked), another)
	case !key.Expires.AsTime().After(now):
		return proto.Errorf(proto.CodeKeyExpired, "the registration key expired on %s: %s", at(key.Expires), another)
	case key.Uses >= key.MaxUses:
		return proto.Errorf(proto.CodeKeyUsedUp, "the registration key is used up (%d of %d uses): %s", key.Uses, key.MaxUses, another)
	}
	return nil
}

func at(t *timestamppb.Timestamp) string { return t.AsTime().UTC().Format("2006-01-02 15:04:05 UTC") }

// checkClock compares the host's clock with ours.
func (s *Service) checkClock(host *timestamppb.Timestamp, now time.Time) error {
	if !host.IsValid() {
		return proto.Errorf(proto.CodeInvalid, "the request does not say what time it is on the host")
	}
	apart := host.AsTime().Sub(now)
	direction := "ahead of"
	if apart < 0 {
		direction, apart = "behind", -apart
	}
	if apart <= s.cfg.Tolerance {
		return nil
	}
	return proto.Errorf(proto.CodeClockSkew, "the host's clock is %s %s the control plane's, more than %s: set it right (timedatectl set-ntp true) and try again",
		apart.Round(time.Second), direction, s.cfg.Tolerance)
}

func setFacts(a *posternv1.Agent, host *posternv1.HostFacts) {
	a.Hostname, a.Os = clip(host.GetHostname(), maxFact), clip(host.GetOs(), maxFact)
	a.Arch, a.Kernel = clip(host.GetArch(), maxFact), clip(host.GetKernel(), maxFact)
}

// clip bounds a peer's text, in bytes.
func clip(text string, n int) string {
	if len(text) > n {
		return text[:n]
	}
	return text
}

// issuer is the fingerprint of the authority that issued a certificate; empty if it is none of ours.
func (s *Service) issuer(certificate *x509.Certificate) string {
	for _, der := range s.cfg.CA.Certificates() {
		ca, err := x509.ParseCertificate(der)
		if err == nil && bytes.Equal(ca.RawSubject, certificate.RawIssuer) && bytes.Equal(ca.SubjectKeyId, certificate.AuthorityKeyId) {
			sum := sha256.Sum256(der)
			return hex.EncodeToString(sum[:])
		}
	}
	return ""
}

// serialText is a serial as package pki writes it in an Identity.
func serialText(serial *big.Int) string { return fmt.Sprintf("%032x", serial) }
