package secret

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/kernelsecret"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// putTime bounds one put, pushTime all those that one request causes, and atOnce how
	// many go on at a time.
	putTime  = 15 * time.Second
	pushTime = 45 * time.Second
	atOnce   = 8
)

// kernelLock orders the puts to a kernel.
type kernelLock struct {
	mu    sync.Mutex
	users int // guarded by Service.mu
}

func (s *Service) lock(kernel string) (unlock func()) {
	s.mu.Lock()
	l := s.locks[kernel]
	if l == nil {
		l = &kernelLock{}
		s.locks[kernel] = l
	}
	l.users++
	s.mu.Unlock()
	l.mu.Lock()
	return func() {
		l.mu.Unlock()
		s.mu.Lock()
		defer s.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(s.locks, kernel)
		}
	}
}

// rank orders secrets of one name: the nearest to its user wins.
func rank(r Row) int { return slices.Index([]string{own, workspace, organization}, r.Scope) }

// state is all that a kernel is to have.
func (s *Service) state(ctx context.Context, organization string, k Kernel) ([]*posternv1.KernelSecret, error) {
	rows, fromHost, err := s.cfg.Store.SecretsOfKernel(ctx, organization, k.ID, k.Owner.GetTokenId())
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(rows, func(a, b Row) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return rank(a) - rank(b)
	})
	rows = slices.CompactFunc(rows, func(a, b Row) bool { return a.Name == b.Name })
	var out []*posternv1.KernelSecret
	for _, name := range fromHost {
		out = append(out, &posternv1.KernelSecret{Name: name, FromHost: true})
	}
	if len(rows) == 0 {
		return out, nil
	}
	box, err := s.cfg.Box(organization)
	if err != nil {
		return nil, err
	}
	for _, r := range rows {
		value, err := box.Open(r.Sealed, About(r))
		if err != nil {
			return nil, &proto.Error{Code: proto.CodeInternal, Message: "secret " + r.Name + " cannot be unsealed: is master.key the one of this installation?", Err: err}
		}
		if slices.Contains(fromHost, r.Name) {
			// An explicit grant of the host's: the two would be one variable.
			out = slices.DeleteFunc(out, func(k *posternv1.KernelSecret) bool { return k.Name == r.Name })
		}
		out = append(out, &posternv1.KernelSecret{Name: r.Name, Value: value})
	}
	if len(out) > kernelsecret.MaxPerKernel {
		return nil, proto.Errorf(proto.CodeOverloaded, "kernel %s would have %d secrets, more than %d: take some back", k.ID, len(out), kernelsecret.MaxPerKernel)
	}
	return out, nil
}

// push gives a kernel all that it is to have. names are those. fresh: it
// has none yet, so that none need no request.
func (s *Service) push(ctx context.Context, c Caller, k Kernel, fresh bool) (resp *posternv1.PutKernelSecretsResponse, names []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, putTime)
	defer cancel()
	defer s.lock(k.ID)()
	all, err := s.state(ctx, c.Organization, k)
	if err != nil {
		return nil, nil, err
	}
	for _, secret := range all {
		names = append(names, secret.Name)
	}
	if len(names) > 0 {
		// From now on the host is asked, should all be taken back while it is away.
		err = s.cfg.Store.PutKernelWorkspaces(ctx, k.ID, []string{""})
	}
	if err != nil || len(names) == 0 && fresh {
		return nil, nil, err
	}
	l, err := s.cfg.Connect(k.Agent)
	if err != nil {
		return nil, names, err
	}
	resp, err = l.PutKernelSecrets(ctx, &posternv1.PutKernelSecretsRequest{KernelId: k.ID, Principal: c.Principal, Secrets: all})
	for _, secret := range all {
		clear(secret.Value)
	}
	if !resp.GetUnchanged() {
		if aerr := s.audit(ctx, c, "secret.push", k.ID, strings.Join(names, " "), err); err == nil {
			err = aerr
		}
	}
	return resp, names, err
}

// pushAll pushes to kernels and says what came of it. name is what they are to have by
// it; empty: one was taken away.
func (s *Service) pushAll(ctx context.Context, c Caller, kernels []Kernel, name string) []*posternv1.SecretDelivery {
	// What was kept is to reach the kernels, whoever hangs up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), pushTime)
	defer cancel()
	out := make([]*posternv1.SecretDelivery, len(kernels))
	places := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	for i, k := range kernels {
		out[i] = &posternv1.SecretDelivery{KernelId: k.ID, Agent: s.cfg.Store.AgentName(ctx, c.Organization, k.Agent)}
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			resp, _, err := s.push(ctx, c, k, false)
			out[i].Problem = problem(resp, err, name)
		})
	}
	wg.Wait()
	return out
}

func problem(resp *posternv1.PutKernelSecretsResponse, err error, name string) string {
	if proto.CodeOf(err) == proto.CodeAgentOffline {
		return "its agent is offline: it gets it when the agent is back"
	}
	if err != nil {
		return proto.Detail(err).Message
	}
	for _, r := range resp.GetRefused() {
		if r.Name == name {
			return r.Reason
		}
	}
	switch {
	case resp.GetWaiting():
		return "the kernel has not taken it yet: it gets it as soon as it listens"
	case resp.GetLater():
		return "the kernel does not run: it gets it when it is resumed or restarted"
	}
	return ""
}

// AgentUp gives an agent that has come back what its kernels are to have, in the
// background.
func (s *Service) AgentUp(organization, agent string) {
	if s.ctx.Err() != nil {
		return
	}
	s.wg.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, 2*time.Minute)
		defer cancel()
		kernels, err := s.cfg.Store.KernelsWithSecrets(ctx, organization, agent)
		if err != nil {
			if s.ctx.Err() == nil {
				s.cfg.Logger.Warn("kernels of an agent not looked up for their secrets", "agent", agent, "err", err)
			}
			return
		}
		for _, k := range kernels {
			owner := Caller{Principal: &posternv1.Principal{Organization: organization, TokenId: k.Owner.GetTokenId(), TokenName: k.Owner.GetTokenName()}}
			if _, _, err := s.push(ctx, owner, k, false); err != nil && s.ctx.Err() == nil {
				s.cfg.Logger.Warn("secrets not given to a kernel", "agent", agent, "kernel", k.ID, "err", err)
			}
		}
	})
}
