package registration

import (
	"context"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
)

// States of a certificate in the store.
const (
	statePending = "pending"
	stateRetired = "retired"
)

const (
	// checkAge is how long an answer of the store is good: what is revoked is
	// refused within this time on every control plane.
	checkAge = 500 * time.Millisecond
	// maxChecks bounds the answers kept. When it is full, all are forgotten.
	maxChecks = 20_000
	// endLeeway is how long a tunnel may outlive its certificate: the agent has
	// had eight hours to renew it.
	endLeeway = time.Hour
	// retirePeace is how long after it was retired a certificate may still be
	// used on a tunnel that is on its way out.
	retirePeace = 10 * time.Minute
	// alarmEvery bounds the entries about one copied certificate.
	alarmEvery = time.Hour
	maxAlarms  = 1000
)

// CheckIdentity fails if the agent was revoked (AGENT_REVOKED), its organization
// disabled (ORGANIZATION_DISABLED), its certificate retired or unknown
// (UNAUTHENTICATED) or long ended (IDENTITY_EXPIRED). It is meant for every
// request: answers are kept for half a second.
func (s *Service) CheckIdentity(ctx context.Context, id Identity) error {
	_, err := s.check(ctx, id, "", retirePeace)
	return err
}

// Admit is CheckIdentity and ConfirmSerial for a tunnel that has just come up;
// here even a freshly retired certificate is one that was copied, and is audited.
// An expired identity is checked and not confirmed.
func (s *Service) Admit(ctx context.Context, id Identity, remote string) error {
	c, err := s.check(ctx, id, remote, 0)
	if err != nil || id.Expired || c.state != statePending {
		return err
	}
	return s.ConfirmSerial(ctx, id)
}

// ConfirmSerial notes that the certificate has been used: if it was pending, it
// becomes active, and those before it retire.
func (s *Service) ConfirmSerial(ctx context.Context, id Identity) error {
	if c, ok := s.checks.get(id, s.cfg.Now()); ok && c.err == nil && c.state != statePending {
		return nil
	}
	changed, err := s.cfg.Store.ConfirmCertificate(ctx, id.Agent, id.Serial, s.cfg.Now())
	if changed {
		s.checks.forget()
	}
	return err
}

// Forget drops the answers kept; call it after a revocation in this process.
func (s *Service) Forget() { s.checks.forget() }

func (s *Service) check(ctx context.Context, id Identity, remote string, peace time.Duration) (checked, error) {
	now := s.cfg.Now()
	c, ok := s.checks.get(id, now)
	if !ok {
		generation := s.checks.generation()
		c = checked{at: now}
		c.state, c.notAfter, c.retired, c.err = s.cfg.Store.IdentityState(ctx, id.Organization, id.Agent, id.Serial)
		if c.err == nil || !uncertain(c.err) {
			s.checks.put(id, c, generation)
		}
	}
	switch {
	case c.err != nil && proto.CodeOf(c.err) == proto.CodeNotFound:
		return c, proto.Errorf(proto.CodeUnauthenticated, "the control plane does not know the agent's certificate: register the host anew with a registration key")
	case c.err != nil:
		return c, c.err
	case c.state == stateRetired:
		if now.Sub(c.retired) >= peace {
			s.alarm(ctx, id, remote, now)
		}
		return c, proto.Errorf(proto.CodeUnauthenticated, "the agent's certificate was replaced by a newer one: if this host is a copy of another, register it anew with a registration key")
	case !id.Expired && now.After(c.notAfter.Add(endLeeway)):
		return c, proto.Errorf(proto.CodeIdentityExpired, "the agent's certificate has ended: it must rejoin before anything else")
	}
	return c, nil
}

// alarm writes down that a certificate is in two places.
func (s *Service) alarm(ctx context.Context, id Identity, remote string, now time.Time) {
	if !s.checks.alarmDue(id.Serial, now) {
		return
	}
	s.log.WarnContext(ctx, "retired certificate used again", "agent_id", id.Agent, "serial", id.Serial, "remote", remote)
	s.audit(ctx, auditchain.Entry{
		Organization: id.Organization, Actor: "agent " + id.Agent, Action: "agent.copied", Target: "certificate " + id.Serial,
		Agent: id.Agent, Verdict: "denied", Outcome: "denied", Remote: remote,
		Error: "a certificate that was replaced has been used again: the host or its credentials may have been copied",
	})
}

// checked is an answer of the store.
type checked struct {
	at                time.Time
	state             string
	notAfter, retired time.Time
	err               error
}

type checks struct {
	mu      sync.Mutex
	answers map[Identity]checked // guarded by mu
	// epoch counts calls of forget, so that an answer that was asked for before
	// is not kept after; guarded by mu.
	epoch  uint64
	alarms map[string]time.Time // guarded by mu
}

func newChecks() *checks {
	return &checks{answers: map[Identity]checked{}, alarms: map[string]time.Time{}}
}

func (c *checks) get(id Identity, now time.Time) (checked, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	answer, ok := c.answers[id]
	age := now.Sub(answer.at)
	return answer, ok && age >= 0 && age < checkAge
}

func (c *checks) generation() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.epoch
}

func (c *checks) put(id Identity, answer checked, generation uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.epoch != generation {
		return
	}
	if len(c.answers) >= maxChecks {
		clear(c.answers)
	}
	c.answers[id] = answer
}

func (c *checks) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.epoch++
	clear(c.answers)
}

func (c *checks) alarmDue(serial string, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if last, ok := c.alarms[serial]; ok && now.Sub(last) < alarmEvery {
		return false
	}
	if len(c.alarms) >= maxAlarms {
		clear(c.alarms)
	}
	c.alarms[serial] = now
	return true
}
