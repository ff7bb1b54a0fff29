package secret

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/kernelsecret"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func newID() string {
	var b [12]byte
	rand.Read(b[:]) //nolint:errcheck // it never fails
	return "sec_" + hex.EncodeToString(b[:])
}

// Grant gives a secret to a kernel or to all of a token, or takes it back.
func (s *Service) Grant(ctx context.Context, c Caller, r *posternv1.GrantSecretRequest) (*posternv1.GrantSecretResponse, error) {
	grant, kernels, ref, err := s.grant(ctx, c, r)
	action := "secret.grant"
	if r.Remove {
		action = "secret.revoke"
	}
	what := "to kernel " + clip(r.KernelId)
	if r.KernelId == "" {
		what = "to all kernels of token " + grant.TokenName
	}
	if aerr := s.audit(ctx, c, action, clip(r.GetRef().GetName()), what, err); err == nil {
		err = aerr
	}
	if err != nil {
		return nil, err
	}
	if !r.Remove && r.KernelId != "" {
		return s.grantOne(ctx, c, grant, kernels[0], ref)
	}
	return &posternv1.GrantSecretResponse{Ref: ref, Kernels: s.pushAll(ctx, c, kernels, nameIf(!r.Remove, grant.Name))}, nil
}

// grantOne gives a kernel what it was granted. A grant that its host refuses is none to
// keep; one to a kernel that can't be reached is.
func (s *Service) grantOne(ctx context.Context, c Caller, g Grant, k Kernel, ref *posternv1.SecretRef) (*posternv1.GrantSecretResponse, error) {
	ctx = context.WithoutCancel(ctx)
	resp, _, err := s.push(ctx, c, k, false)
	why := problem(resp, err, g.Name)
	refused := proto.CodeOf(err) == proto.CodePolicyDenied || proto.CodeOf(err) == proto.CodeInvalid
	for _, r := range resp.GetRefused() {
		refused = refused || r.Name == g.Name
	}
	if !refused {
		return &posternv1.GrantSecretResponse{Ref: ref, Kernels: []*posternv1.SecretDelivery{
			{KernelId: k.ID, Agent: s.cfg.Store.AgentName(ctx, c.Organization, k.Agent), Problem: why},
		}}, nil
	}
	if err := s.cfg.Store.DeleteSecretGrant(ctx, c.Organization, g); err != nil && proto.CodeOf(err) != proto.CodeNotFound {
		return nil, err
	}
	if g.Secret == "" {
		return nil, proto.Errorf(proto.CodePolicyDenied, "secret %s is none of yours here, and the host says: %s", g.Name, why)
	}
	return nil, proto.Errorf(proto.CodePolicyDenied, "secret %s: %s", g.Name, why)
}

func nameIf(yes bool, name string) string {
	if yes {
		return name
	}
	return ""
}

func (s *Service) grant(ctx context.Context, c Caller, r *posternv1.GrantSecretRequest) (g Grant, kernels []Kernel, ref *posternv1.SecretRef, err error) {
	targets := 0
	for _, given := range []bool{r.KernelId != "", r.All, r.Token != ""} {
		if given {
			targets++
		}
	}
	if targets != 1 {
		return g, nil, nil, proto.Errorf(proto.CodeInvalid, "the request must name one: a kernel, all of one's own, or a token")
	}
	if err := kernelsecret.CheckName(r.GetRef().GetName()); err != nil {
		return g, nil, nil, err
	}
	operator := s.cfg.Operator(c.Role)
	g.Name = r.Ref.Name
	switch {
	case r.All:
		g.Token, g.TokenName = c.TokenId, c.TokenName
	case r.Token != "":
		if g.Token, g.TokenName, err = s.cfg.Store.Token(ctx, c.Organization, r.Token); err != nil {
			return g, nil, nil, err
		}
		if g.Token != c.TokenId && !operator {
			return g, nil, nil, proto.Errorf(proto.CodeRoleDenied, "token %s has the role %s: granting a secret to another token needs operator", c.TokenName, c.Role)
		}
	default:
		k, err := s.cfg.Store.Kernel(ctx, c.Organization, r.KernelId)
		if err == nil && k.Owner.GetTokenId() != c.TokenId && !operator {
			err = proto.Errorf(proto.CodeNotFound, "kernel %q not found", clip(r.KernelId))
		}
		if err != nil {
			return g, nil, nil, err
		}
		g.Kernel = k.ID
		kernels = []Kernel{k}
	}
	scope := r.Ref.Scope
	row, err := s.lookUp(ctx, c, r.Ref)
	switch {
	case err == nil:
		g.Secret = row.ID
		ref = describe(row).Ref
		if row.Scope == own && (g.Token != "" && g.Token != c.TokenId || len(kernels) == 1 && kernels[0].Owner.GetTokenId() != c.TokenId) {
			return g, nil, nil, proto.Errorf(proto.CodeRoleDenied, "secret %s is your own: it can be given to your own kernels alone; make one of the organization to share it", g.Name)
		}
	case scope == posternv1.SecretScope_SECRET_SCOPE_HOST, scope == posternv1.SecretScope_SECRET_SCOPE_UNSPECIFIED && proto.CodeOf(err) == proto.CodeNotFound && (r.KernelId != "" || r.Remove):
		ref = &posternv1.SecretRef{Name: g.Name, Scope: posternv1.SecretScope_SECRET_SCOPE_HOST}
	default:
		return g, nil, nil, err
	}
	if r.Remove {
		if len(kernels) == 0 {
			if kernels, err = s.cfg.Store.KernelsWithSecret(ctx, c.Organization, g.Secret, g.Name); err != nil {
				return g, nil, nil, err
			}
		}
		return g, kernels, ref, s.cfg.Store.DeleteSecretGrant(ctx, c.Organization, g)
	}
	if err := s.cfg.Store.PutSecretGrant(ctx, c.Organization, g, time.Now()); err != nil {
		return g, nil, nil, err
	}
	if len(kernels) > 0 {
		return g, kernels, ref, nil
	}
	kernels, err = s.cfg.Store.KernelsWithSecret(ctx, c.Organization, g.Secret, g.Name)
	return g, kernels, ref, err
}

// lookUp finds the secret that a reference means: without a scope the caller's own, else,
// for operators, the organization's.
func (s *Service) lookUp(ctx context.Context, c Caller, r *posternv1.SecretRef) (Row, error) {
	if r.Scope == posternv1.SecretScope_SECRET_SCOPE_HOST {
		return Row{}, proto.Errorf(proto.CodeNotFound, "secret %q is the hosts'", r.Name)
	}
	scope, owner, _, err := s.ref(c, r, true)
	if err != nil {
		return Row{}, err
	}
	row, err := s.cfg.Store.Secret(ctx, c.Organization, scope, owner, r.Name)
	if r.Scope == posternv1.SecretScope_SECRET_SCOPE_UNSPECIFIED && proto.CodeOf(err) == proto.CodeNotFound && s.cfg.Operator(c.Role) {
		return s.cfg.Store.Secret(ctx, c.Organization, organization, "", r.Name)
	}
	return row, err
}

// Started gives a kernel that was started just now its secrets: those wanted by name, which
// fail the start if the kernel can't have them, and those of standing grants and of its
// workspaces, of which warnings say what the host refused.
func (s *Service) Started(ctx context.Context, c Caller, k Kernel, wanted, workspaces []string) (warnings []string, err error) {
	if len(wanted) > kernelsecret.MaxPerKernel {
		return nil, proto.Errorf(proto.CodeInvalid, "a kernel has at most %d secrets", kernelsecret.MaxPerKernel)
	}
	if len(workspaces) > 0 {
		if err := s.cfg.Store.PutKernelWorkspaces(ctx, k.ID, workspaces); err != nil {
			return nil, err
		}
	}
	for _, name := range wanted {
		if err := kernelsecret.CheckName(name); err != nil {
			return nil, err
		}
		g := Grant{Name: name, Kernel: k.ID}
		row, err := s.lookUp(ctx, c, &posternv1.SecretRef{Name: name})
		if err == nil {
			g.Secret = row.ID
		} else if proto.CodeOf(err) != proto.CodeNotFound {
			return nil, err
		}
		err = s.cfg.Store.PutSecretGrant(ctx, c.Organization, g, time.Now())
		if aerr := s.audit(ctx, c, "secret.grant", name, "to kernel "+k.ID, err); err == nil {
			err = aerr
		}
		if err != nil {
			return nil, err
		}
	}
	resp, names, err := s.push(ctx, c, k, true)
	if err != nil {
		if len(wanted) == 0 && len(names) > 0 && proto.CodeOf(err) != proto.CodeInternal {
			// Standing grants keep nobody from starting kernels on a host that takes none.
			return []string{"the kernel does not have the secrets granted to it: " + proto.Detail(err).Message}, nil
		}
		return nil, err
	}
	for _, r := range resp.GetRefused() {
		for _, name := range wanted {
			if name == r.Name {
				return nil, proto.Errorf(proto.CodePolicyDenied, "secret %s: %s", name, r.Reason)
			}
		}
		warnings = append(warnings, "the kernel does not have secret "+r.Name+": "+r.Reason)
	}
	return warnings, nil
}

// Moved gives a kernel that has come to another host its secrets there.
func (s *Service) Moved(ctx context.Context, k Kernel) {
	c := Caller{Principal: &posternv1.Principal{Organization: k.Owner.GetOrganization(), TokenId: k.Owner.GetTokenId(), TokenName: k.Owner.GetTokenName()}}
	resp, names, err := s.push(context.WithoutCancel(ctx), c, k, true)
	for _, r := range resp.GetRefused() {
		s.cfg.Logger.Info("a kernel that was moved does not get a secret", "kernel", k.ID, "secret", r.Name, "reason", r.Reason)
	}
	if err != nil && len(names) > 0 {
		s.cfg.Logger.Warn("a kernel that was moved has no secrets yet", "kernel", k.ID, "err", err)
	}
}

// Forked gives a fork what its original has.
func (s *Service) Forked(ctx context.Context, c Caller, from string, k Kernel) error {
	if err := s.cfg.Store.CopyKernelGrants(ctx, c.Organization, from, k.ID, time.Now()); err != nil {
		return err
	}
	if _, names, err := s.push(ctx, c, k, true); err != nil && (len(names) == 0 || proto.CodeOf(err) == proto.CodeInternal) {
		return err
	}
	return nil // what the host refuses keeps nobody from forking
}

// TokenRevoked takes from kernels what a token gave them that is no more, in the
// background.
func (s *Service) TokenRevoked(organization, token string) {
	if s.ctx.Err() != nil {
		return
	}
	s.wg.Go(func() {
		kernels, err := s.cfg.Store.KernelsWithSecrets(s.ctx, organization, "")
		if err != nil {
			if s.ctx.Err() == nil {
				s.cfg.Logger.Warn("kernels of a revoked token not looked up for their secrets", "err", err)
			}
			return
		}
		for _, k := range kernels {
			if k.Owner.GetTokenId() != token {
				continue
			}
			c := Caller{Principal: k.Owner}
			c.Organization = organization
			if _, _, err := s.push(s.ctx, c, k, false); err != nil && s.ctx.Err() == nil {
				s.cfg.Logger.Warn("secrets of a revoked token not taken from a kernel yet", "kernel", k.ID, "err", err)
			}
		}
	})
}
