package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/postern-dev/postern/agentd/atomicfile"
	"github.com/postern-dev/postern/agentd/kernel"
	"github.com/postern-dev/postern/agentd/link"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// revokedFile is in the state directory while this agent, or its organization, may not
// work as far as the control plane said last.
const revokedFile = "revoked.json"

// Actions in the audit log.
const (
	actionRevoked  = "agent.revoked"
	actionRestored = "agent.restored"
)

// standing is whether the control plane lets this agent work, as far as the host knows.
// Kernels ask data sources without the control plane: this is what stops them when it has
// revoked the agent. It holds over restarts of agentd, and ends when the control plane
// welcomes the agent.
type standing struct {
	file    string
	agentID string

	// mu guards the following; why is ended, with a cause, while the agent is revoked.
	mu   sync.Mutex
	why  context.Context
	stop context.CancelCauseFunc
}

// revokedNote is the file's content.
type revokedNote struct {
	AgentID string     `json:"agent_id"`
	Code    proto.Code `json:"code"`
	Since   time.Time  `json:"since"`
}

// errNoStanding is what kernels are told.
func errNoStanding(code proto.Code) error {
	if code == proto.CodeOrganizationDisabled {
		return proto.Errorf(proto.CodePolicyDenied, "the organization was disabled at the control plane: kernels of this host may use no data source until it is enabled again and the link is up")
	}
	return proto.Errorf(proto.CodePolicyDenied, "this agent was revoked at the control plane: its kernels may use no data source until the host is registered again and the link is up")
}

// openStanding reads what was known when agentd ended. A note about another agent, from
// before the host was registered anew, says nothing any more; one that can't be read
// counts as a revocation.
func openStanding(state, agentID string) (*standing, error) {
	s := &standing{file: filepath.Join(state, revokedFile), agentID: agentID}
	s.why, s.stop = context.WithCancelCause(context.Background())
	text, err := os.ReadFile(s.file)
	if errors.Is(err, os.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("whether this agent was revoked: %w", err)
	}
	var note revokedNote
	if err := json.Unmarshal(text, &note); err != nil {
		note = revokedNote{AgentID: agentID, Code: proto.CodeAgentRevoked}
	}
	if note.AgentID == agentID {
		s.stop(errNoStanding(note.Code))
	}
	return s, nil
}

// revoke ends what kernels ask, now and from now on. It reports whether that is new; an
// error means that a restart of agentd may forget it until the control plane says it again.
func (s *standing) revoke(code proto.Code) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.why.Err() != nil {
		return false, nil
	}
	s.stop(errNoStanding(code))
	text, err := json.Marshal(revokedNote{AgentID: s.agentID, Code: code, Since: time.Now().UTC()})
	if err != nil {
		return true, err
	}
	var files atomicfile.FS
	return true, files.Write(s.file, text, 0o600)
}

// restore lets kernels ask again. It reports whether that is new.
func (s *standing) restore() (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.why.Err() == nil {
		return false, nil
	}
	var files atomicfile.FS
	if err := files.Remove(s.file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	s.why, s.stop = context.WithCancelCause(context.Background())
	return true, nil
}

// bound is ctx until the agent is revoked; the caller calls done.
func (s *standing) bound(ctx context.Context) (bounded context.Context, done func()) {
	s.mu.Lock()
	why := s.why
	s.mu.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	if why.Err() != nil { // before anything is asked: it is refused, and the log has it
		cancel(context.Cause(why))
	}
	stop := context.AfterFunc(why, func() { cancel(context.Cause(why)) })
	return ctx, func() { stop(); cancel(nil) }
}

// noteStanding takes from a change of the link what it says about the agent's standing.
func (d *Daemon) noteStanding(s link.State) {
	if s.Up || s.Code != proto.CodeAgentRevoked && s.Code != proto.CodeOrganizationDisabled {
		return
	}
	now, err := d.standing.revoke(s.Code)
	if err != nil {
		d.logger.Error("a revocation is not noted on the disk: after a restart of agentd it holds when the control plane has said it again", "err", err)
	}
	if !now {
		return
	}
	d.logger.Error("kernels of this host may use no data source any more", "err", s.Cause)
	if err := d.record(actionRevoked); err != nil {
		d.logger.Error("revocation not recorded", "err", err)
	}
}

// restoreStanding is for a host that the control plane has welcomed.
func (d *Daemon) restoreStanding() {
	now, err := d.standing.restore()
	switch {
	case err != nil:
		d.logger.Error("kernels stay without data sources: the note of a revocation can't be removed", "err", err)
	case now:
		d.logger.Info("kernels of this host may use data sources again")
		if err := d.record(actionRestored); err != nil {
			d.logger.Error("end of a revocation not recorded", "err", err)
		}
	}
}

// standingSQL is SQL for kernels while the agent may work.
type standingSQL struct {
	kernel.SQL
	standing *standing
}

// RunLocal implements kernel.SQL.
func (s standingSQL) RunLocal(ctx context.Context, r *posternv1.SQLRequest, from string, w io.Writer) *posternv1.QueryOutcome {
	ctx, done := s.standing.bound(ctx)
	defer done()
	outcome := s.SQL.RunLocal(ctx, r, from, w)
	if outcome.GetError().GetCode() == proto.CodeCancelled && ctx.Err() != nil && proto.CodeOf(context.Cause(ctx)) == proto.CodePolicyDenied {
		outcome.Error = proto.Detail(context.Cause(ctx)) // who cancelled it
	}
	return outcome
}
