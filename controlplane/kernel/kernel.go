package kernel

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// agentTime bounds a question to an agent, and startTime the start, restart or
	// stop of a kernel.
	agentTime = 15 * time.Second
	startTime = 2 * time.Minute
	// listTime bounds the wait for one agent's list, and listAtOnce is how many agents
	// are asked at a time.
	listTime   = 5 * time.Second
	listAtOnce = 16
	// settleTime is how long a kernel that its agent does not list may be about to
	// start.
	settleTime = startTime + 30*time.Second
	// maxEnvironment and maxMounts bound what a start asks for.
	maxEnvironment, maxMounts = 64, 16
	// maxName bounds a spec's name, in bytes.
	maxName = 256
)

// Start is a kernel to start.
type Start struct {
	// Agent is an id or a name, Spec may be empty: the agent's default.
	Agent, Spec string
	Environment map[string]string
	Mounts      []*posternv1.KernelMount
	// Secrets are names of those to grant the kernel from its start.
	Secrets []string
}

// newID is a UUID of version 7.
func newID() string {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic(err) // never happens: crypto/rand aborts the program itself
	}
	ms := uint64(time.Now().UnixMilli())
	for i := range 6 {
		b[i] = byte(ms >> (40 - 8*i))
	}
	b[6], b[8] = b[6]&0x0f|0x70, b[8]&0x3f|0x80
	t := hex.EncodeToString(b[:])
	return t[:8] + "-" + t[8:12] + "-" + t[12:16] + "-" + t[16:20] + "-" + t[20:]
}

// agent finds an agent and its tunnel. The agent is there also with AGENT_OFFLINE.
func (s *Service) agent(ctx context.Context, c Caller, idOrName string) (*posternv1.Agent, Agent, error) {
	if idOrName == "" {
		return nil, nil, proto.Errorf(proto.CodeInvalid, "the request names no agent")
	}
	agent, err := s.cfg.Store.FindAgent(ctx, c.Organization, idOrName)
	if err != nil {
		return nil, nil, err
	}
	if agent.Revoked != nil {
		return nil, nil, proto.Errorf(proto.CodeNotFound, "agent %s was revoked", agent.Name)
	}
	l, err := s.cfg.Connect(agent.Id)
	if proto.CodeOf(err) == proto.CodeAgentOffline {
		err = proto.Errorf(proto.CodeAgentOffline, "agent %s is offline: it has no tunnel at present; see `agentd status` on its host", agent.Name)
	}
	return agent, l, err
}

// find finds a kernel that the caller may know of.
func (s *Service) find(ctx context.Context, c Caller, id string, ownerOnly bool) (Row, error) {
	if id == "" {
		return Row{}, proto.Errorf(proto.CodeInvalid, "the request names no kernel")
	}
	row, err := s.cfg.Store.Kernel(ctx, c.Organization, id)
	if err != nil {
		return Row{}, err
	}
	mine := row.Owner.TokenId == c.TokenId
	switch {
	case mine:
	case !s.cfg.Operator(c.Role):
		return Row{}, proto.Errorf(proto.CodeNotFound, "kernel %q not found", id)
	case ownerOnly:
		return Row{}, proto.Errorf(proto.CodeRoleDenied, "kernel %s is of token %s: others may see, interrupt and stop it, not use it", id, row.Owner.TokenName)
	}
	return row, nil
}

// gone forgets a kernel that its agent does not know.
func (s *Service) gone(ctx context.Context, row Row, err error) error {
	if proto.CodeOf(err) != proto.CodeNotFound {
		return err
	}
	if time.Since(row.Started) < settleTime {
		// It may be about to start; if not, the next to ask finds out.
		return err
	}
	if derr := s.cfg.Store.DeleteKernel(ctx, row.Owner.Organization, row.ID); derr != nil {
		s.cfg.Logger.Warn("kernel that is gone not forgotten", "kernel", row.ID, "err", derr)
	}
	return err
}

// reach finds a kernel and the agent that has it.
func (s *Service) reach(ctx context.Context, c Caller, id string, ownerOnly bool) (Row, *posternv1.Agent, Agent, error) {
	row, err := s.find(ctx, c, id, ownerOnly)
	if err != nil {
		return Row{}, nil, nil, err
	}
	agent, l, err := s.agent(ctx, c, row.Agent)
	if proto.CodeOf(err) == proto.CodeNotFound { // revoked: nobody will hear of its kernels again
		s.cfg.Store.DeleteKernel(ctx, c.Organization, row.ID) //nolint:errcheck // the next to ask tries again
	}
	return row, agent, l, err
}

// audit writes an entry for what the caller did, or failed to do, to a kernel.
func (s *Service) audit(ctx context.Context, c Caller, action string, agent *posternv1.Agent, id string, err error, change ...func(*auditchain.Entry)) error {
	e := auditchain.Entry{
		Time: time.Now(), Organization: c.Organization, Actor: "token " + c.TokenName, Role: c.Role, Remote: c.Remote,
		Action: action, Target: id, Agent: agent.GetName(), Verdict: "allowed", Outcome: "done",
	}
	if err != nil {
		e.Outcome, e.Error = "failed", proto.Detail(err).Message
		if proto.CodeOf(err) == proto.CodePolicyDenied {
			e.Outcome, e.Verdict = "denied", "denied"
		}
	}
	for _, f := range change {
		f(&e)
	}
	return s.cfg.Append(context.WithoutCancel(ctx), e)
}

// Agent finds an agent that is not revoked, online or not.
func (s *Service) Agent(ctx context.Context, c Caller, idOrName string) (*posternv1.Agent, error) {
	agent, _, err := s.agent(ctx, c, idOrName)
	if agent != nil {
		return agent, nil
	}
	return nil, err
}

// Where is the id of the agent that has a kernel.
func (s *Service) Where(ctx context.Context, c Caller, id string) (string, error) {
	row, err := s.find(ctx, c, id, false)
	return row.Agent, err
}

// Specs are the kernelspecs of an agent.
func (s *Service) Specs(ctx context.Context, c Caller, agent string) (*posternv1.ListKernelSpecsResponse, error) {
	_, l, err := s.agent(ctx, c, agent)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, agentTime)
	defer cancel()
	return l.ListKernelSpecs(ctx, &posternv1.ListKernelSpecsRequest{Principal: c.Principal})
}

// Start starts a kernel. A kernel whose start did not get an answer is stopped, if it
// can be reached, and found by List, if not.
func (s *Service) Start(ctx context.Context, c Caller, r Start) (*posternv1.AgentKernel, error) {
	switch {
	case len(r.Spec) > maxName:
		return nil, proto.Errorf(proto.CodeInvalid, "a kernelspec's name has at most %d bytes", maxName)
	case len(r.Environment) > maxEnvironment:
		return nil, proto.Errorf(proto.CodeInvalid, "a kernel's environment has at most %d variables", maxEnvironment)
	case len(r.Mounts) > maxMounts:
		return nil, proto.Errorf(proto.CodeInvalid, "a kernel has at most %d mounts", maxMounts)
	}
	agent, l, err := s.agent(ctx, c, r.Agent)
	if err != nil {
		return nil, err
	}
	row := Row{ID: newID(), Agent: agent.Id, Owner: c.Principal, Spec: r.Spec, Started: time.Now()}
	if err := s.cfg.Store.InsertKernel(ctx, row); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	k, err := l.StartKernel(ctx, &posternv1.StartKernelRequest{Id: row.ID, Spec: r.Spec, Principal: c.Principal, Environment: r.Environment, Mounts: r.Mounts})
	var warnings []string
	if err == nil {
		warnings, err = s.cfg.Secrets.Started(ctx, c, row, r.Secrets, workspaces(r.Mounts))
	}
	aerr := s.audit(ctx, c, "kernel.start", agent, row.ID, err, func(e *auditchain.Entry) { e.Statement = "spec " + specOf(r.Spec, k) })
	if err == nil && aerr == nil {
		if k.Spec != row.Spec || k.Language != row.Language {
			if err := s.cfg.Store.DescribeKernel(ctx, c.Organization, row.ID, k.Spec, k.Language); err != nil {
				s.cfg.Logger.Warn("kernel not described", "kernel", row.ID, "err", err)
			}
		}
		return &posternv1.AgentKernel{Agent: agent.Name, Kernel: k, Online: true, Warnings: warnings}, nil
	}
	s.undo(ctx, c, l, row, err, k != nil)
	if err != nil {
		return nil, err
	}
	return nil, aerr
}

// workspaces are the names of those that are mounted.
func workspaces(mounts []*posternv1.KernelMount) []string {
	var names []string
	for _, m := range mounts {
		names = append(names, m.Workspace)
	}
	return names
}

func specOf(asked string, k *posternv1.Kernel) string {
	if k.GetSpec() != "" {
		return k.Spec
	}
	if asked == "" {
		return "(the default)"
	}
	return asked
}

// undo takes back a start that failed, or that could not be recorded. runs: it runs for
// certain.
func (s *Service) undo(ctx context.Context, c Caller, l Agent, row Row, failed error, runs bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), agentTime)
	defer cancel()
	switch proto.CodeOf(failed) {
	case 0, proto.CodeAgentLost, proto.CodeAgentOffline, proto.CodeTimeout, proto.CodeCancelled, proto.CodeUnavailable, proto.CodeInternal:
		runs = true // or it may
	}
	if runs {
		_, err := l.StopKernel(ctx, &posternv1.KernelRequest{Id: row.ID, Principal: c.Principal})
		if err != nil && proto.CodeOf(err) != proto.CodeNotFound {
			s.cfg.Logger.Warn("kernel that failed to start not stopped: it is in the list", "kernel", row.ID, "err", err, "cause", failed)
			return
		}
	}
	if err := s.cfg.Store.DeleteKernel(ctx, c.Organization, row.ID); err != nil {
		s.cfg.Logger.Warn("kernel that failed to start not forgotten", "kernel", row.ID, "err", err)
	}
}

// Get asks a kernel's agent how it is.
func (s *Service) Get(ctx context.Context, c Caller, id string) (*posternv1.AgentKernel, error) {
	row, agent, l, err := s.reach(ctx, c, id, false)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, agentTime)
	defer cancel()
	k, err := l.GetKernel(ctx, &posternv1.KernelRequest{Id: id, Principal: c.Principal})
	if err == nil && k.Move != nil && s.unheld(ctx, row, l, errHeld) {
		if row, agent, l, err = s.reach(ctx, c, id, false); err == nil {
			k, err = l.GetKernel(ctx, &posternv1.KernelRequest{Id: id, Principal: c.Principal})
		}
	}
	if err != nil {
		return nil, s.gone(ctx, row, err)
	}
	return &posternv1.AgentKernel{Agent: agent.Name, Kernel: k, Online: true}, nil
}

// Interrupt interrupts what a kernel runs.
func (s *Service) Interrupt(ctx context.Context, c Caller, id string) (*posternv1.AgentKernel, error) {
	return s.change(ctx, c, id, false, agentTime, "kernel.interrupt", Agent.InterruptKernel)
}

// Restart ends a kernel's processes and starts them anew under the same id.
func (s *Service) Restart(ctx context.Context, c Caller, id string) (*posternv1.AgentKernel, error) {
	return s.change(ctx, c, id, true, startTime, "kernel.restart", Agent.RestartKernel)
}

func (s *Service) change(ctx context.Context, c Caller, id string, ownerOnly bool, limit time.Duration, action string, do func(Agent, context.Context, *posternv1.KernelRequest) (*posternv1.Kernel, error)) (*posternv1.AgentKernel, error) {
	row, agent, l, err := s.reach(ctx, c, id, ownerOnly)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	k, err := do(l, ctx, &posternv1.KernelRequest{Id: id, Principal: c.Principal})
	if err != nil && s.unheld(ctx, row, l, err) {
		if row, agent, l, err = s.reach(ctx, c, id, ownerOnly); err == nil {
			k, err = do(l, ctx, &posternv1.KernelRequest{Id: id, Principal: c.Principal})
		}
	}
	if aerr := s.audit(ctx, c, action, agent, id, err); err == nil {
		err = aerr
	}
	if err != nil {
		return nil, s.gone(ctx, row, err)
	}
	return &posternv1.AgentKernel{Agent: agent.Name, Kernel: k, Online: true}, nil
}

// Stop ends a kernel. What its agent does not know any more is stopped, too.
func (s *Service) Stop(ctx context.Context, c Caller, id string) error {
	row, agent, l, err := s.reach(ctx, c, id, false)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	if k, kerr := ask(ctx, l, row); kerr == nil && k.Move != nil {
		if !s.unheld(ctx, row, l, errHeld) {
			return proto.Errorf(proto.CodeUnavailable, "kernel %s is being moved to another host: try again when that is done", id)
		}
		if row, agent, l, err = s.reach(ctx, c, id, false); err != nil {
			return err
		}
	}
	_, err = l.StopKernel(ctx, &posternv1.KernelRequest{Id: id, Principal: c.Principal})
	if aerr := s.audit(ctx, c, "kernel.stop", agent, id, err); err == nil {
		err = aerr
	}
	if err != nil {
		return s.gone(ctx, row, err)
	}
	return s.cfg.Store.DeleteKernel(ctx, c.Organization, id)
}

// List asks the agents that are online, or one, for the kernels that the caller may
// see; of agents that are away it tells what is remembered.
func (s *Service) List(ctx context.Context, c Caller, agentName string) (*posternv1.ListAgentKernelsResponse, error) {
	var agents []*posternv1.Agent
	only := ""
	if agentName == "" {
		var err error
		if agents, err = s.cfg.Store.ListAgents(ctx, c.Organization); err != nil {
			return nil, err
		}
	} else {
		agent, _, err := s.agent(ctx, c, agentName)
		if agent == nil {
			return nil, err
		}
		agents, only = append(agents, agent), agent.Id
	}
	rows, err := s.cfg.Store.Kernels(ctx, c.Organization, only)
	if err != nil {
		return nil, err
	}
	remembered := map[string][]Row{}
	for _, row := range rows {
		remembered[row.Agent] = append(remembered[row.Agent], row)
	}
	var (
		mu     sync.Mutex
		wg     sync.WaitGroup
		resp   = &posternv1.ListAgentKernelsResponse{}
		places = make(chan struct{}, listAtOnce)
	)
	ctx, cancel := context.WithTimeout(ctx, listTime)
	defer cancel()
	for _, agent := range agents {
		if agent.Revoked != nil {
			continue
		}
		mine := slices.DeleteFunc(remembered[agent.Id], func(row Row) bool { return !s.maySee(c, row.Owner) })
		l, err := s.cfg.Connect(agent.Id)
		if err != nil {
			resp.Kernels = locked(&mu, resp.Kernels, away(agent, mine))
			continue
		}
		if len(remembered[agent.Id]) == 0 && agentName == "" && !s.cfg.Operator(c.Role) {
			continue // it has none of this caller's
		}
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			got, err := l.ListKernels(ctx, &posternv1.ListKernelsRequest{Principal: c.Principal})
			var kernels []*posternv1.AgentKernel
			if err == nil {
				kernels = s.merge(ctx, c, agent, l, mine, got.Kernels)
			} else {
				kernels = away(agent, mine)
			}
			mu.Lock()
			defer mu.Unlock()
			resp.Kernels = append(resp.Kernels, kernels...)
			if err != nil && proto.CodeOf(err) != proto.CodePolicyDenied { // kernels are off there
				resp.Silent = append(resp.Silent, agent.Name)
			}
		})
	}
	wg.Wait()
	slices.SortStableFunc(resp.Kernels, func(a, b *posternv1.AgentKernel) int {
		return a.Kernel.GetStarted().AsTime().Compare(b.Kernel.GetStarted().AsTime())
	})
	slices.Sort(resp.Silent)
	return resp, nil
}

func locked[T any](mu *sync.Mutex, all, more []T) []T {
	mu.Lock()
	defer mu.Unlock()
	return append(all, more...)
}

func (s *Service) maySee(c Caller, owner *posternv1.Principal) bool {
	return owner.GetOrganization() == c.Organization && (owner.GetTokenId() == c.TokenId || s.cfg.Operator(c.Role))
}

// away is what is remembered of kernels whose agent does not answer.
func away(agent *posternv1.Agent, rows []Row) []*posternv1.AgentKernel {
	all := make([]*posternv1.AgentKernel, len(rows))
	for i, row := range rows {
		all[i] = &posternv1.AgentKernel{Agent: agent.Name, Kernel: &posternv1.Kernel{
			Id: row.ID, Spec: row.Spec, Language: row.Language, Owner: row.Owner, Started: timestamppb.New(row.Started),
		}}
	}
	return all
}

// merge holds what an agent has against what is remembered: what is gone is
// forgotten, and what is not known here, after a database was restored say, is
// remembered.
func (s *Service) merge(ctx context.Context, c Caller, agent *posternv1.Agent, l Agent, rows []Row, got []*posternv1.Kernel) []*posternv1.AgentKernel {
	known := map[string]Row{}
	for _, row := range rows {
		known[row.ID] = row
	}
	var all []*posternv1.AgentKernel
	for _, k := range got {
		if k.Owner.GetOrganization() != c.Organization {
			continue
		}
		if k.Move != nil && !s.listed(ctx, agent, l, k) {
			delete(known, k.Id)
			continue
		}
		_, there := known[k.Id]
		delete(known, k.Id)
		if !s.maySee(c, k.Owner) {
			continue
		}
		if !there {
			err := s.cfg.Store.InsertKernel(ctx, Row{ID: k.Id, Agent: agent.Id, Owner: k.Owner, Spec: k.Spec, Language: k.Language, Started: k.Started.AsTime()})
			if err != nil {
				s.cfg.Logger.Warn("kernel not remembered", "kernel", k.Id, "err", err)
			}
		}
		all = append(all, &posternv1.AgentKernel{Agent: agent.Name, Kernel: k, Online: true})
	}
	for _, row := range known {
		s.gone(ctx, row, proto.Errorf(proto.CodeNotFound, "not listed")) //nolint:errcheck // it is what was passed
	}
	return all
}
