package secret

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	"github.com/postern-dev/postern/proto/kernelsecret"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Scopes of stored secrets.
const (
	own          = "own"
	workspace    = "workspace"
	organization = "organization"
)

// maxWorkspace bounds a workspace's name, in bytes.
const maxWorkspace = 128

// Row is a stored secret; Owner is a token's id (scope "own"), a workspace's name
// ("workspace") or empty ("organization").
type Row struct {
	ID, Organization              string
	Scope, Owner, OwnerName, Name string
	Sealed                        []byte
	Created, Changed              time.Time
	ChangedBy                     string
}

// Grant is who has a secret; an empty Secret means that hosts read it.
type Grant struct {
	Secret, Name             string
	Kernel, Token, TokenName string
}

// Kernel is where a kernel is, and whose.
type Kernel struct {
	ID, Agent string
	Owner     *posternv1.Principal
}

// Store keeps secrets and grants. All is scoped by organization; what is not there is
// NOT_FOUND.
type Store interface {
	PutSecret(context.Context, Row) (Row, error)
	Secret(ctx context.Context, organization, scope, owner, name string) (Row, error)
	Secrets(ctx context.Context, organization string) ([]Row, error)
	DeleteSecret(ctx context.Context, organization, id string) error
	PutSecretGrant(ctx context.Context, organization string, g Grant, now time.Time) error
	DeleteSecretGrant(ctx context.Context, organization string, g Grant) error
	SecretGrants(ctx context.Context, organization string) ([]Grant, error)
	SecretsOfKernel(ctx context.Context, organization, kernel, token string) (secrets []Row, fromHost []string, err error)
	KernelsWithSecret(ctx context.Context, organization, id, name string) ([]Kernel, error)
	KernelsWithSecrets(ctx context.Context, organization, agent string) ([]Kernel, error)
	PutKernelWorkspaces(ctx context.Context, kernel string, workspaces []string) error
	CopyKernelGrants(ctx context.Context, organization, from, to string, now time.Time) error

	Kernel(ctx context.Context, organization, id string) (Kernel, error)
	AgentName(ctx context.Context, organization, id string) string
	// Token finds a token that is not revoked by id or name.
	Token(ctx context.Context, organization, idOrName string) (id, name string, err error)
}

// Agent is a live tunnel to an agent. Its errors carry codes of package proto.
type Agent interface {
	PutKernelSecrets(context.Context, *posternv1.PutKernelSecretsRequest) (*posternv1.PutKernelSecretsResponse, error)
}

// Box seals values; about binds them to what they are.
type Box interface {
	Seal(plain []byte, about string) ([]byte, error)
	Open(sealed []byte, about string) ([]byte, error)
}

// Caller is who asks, and from where.
type Caller struct {
	*posternv1.Principal
	Remote string
}

// Config is what a Service needs; all fields are required.
type Config struct {
	Logger *slog.Logger
	Store  Store
	// Box returns an organization's.
	Box func(organization string) (Box, error)
	// Connect returns an agent's live tunnel, by its id; AGENT_OFFLINE if it has none.
	Connect func(agentID string) (Agent, error)
	// Append writes an audit entry durably, or fails.
	Append func(context.Context, auditchain.Entry) error
	// Operator reports whether a role may set and grant what is not its own.
	Operator func(role string) bool
}

// Service keeps secrets.
type Service struct {
	cfg    Config
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	// mu orders puts to one kernel: the newest state is what it has in the end.
	mu    sync.Mutex
	locks map[string]*kernelLock
}

// New returns a Service; Close it.
func New(cfg Config) *Service {
	s := &Service{cfg: cfg, locks: map[string]*kernelLock{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Close ends what goes on in the background, and waits.
func (s *Service) Close() {
	s.cancel()
	s.wg.Wait()
}

// About is what a row's sealed value is bound to: its Organization, Scope, Owner and Name.
func About(r Row) string {
	return r.Organization + "\x00" + r.Scope + "\x00" + r.Owner + "\x00" + r.Name
}

// ref reads a caller's reference and holds it to what the caller may do.
func (s *Service) ref(c Caller, r *posternv1.SecretRef, change bool) (scope, owner, ownerName string, err error) {
	if err := kernelsecret.CheckName(r.GetName()); err != nil {
		return "", "", "", err
	}
	operator := s.cfg.Operator(c.Role)
	switch r.GetScope() {
	case posternv1.SecretScope_SECRET_SCOPE_UNSPECIFIED, posternv1.SecretScope_SECRET_SCOPE_OWN:
		if r.Workspace != "" {
			return "", "", "", proto.Errorf(proto.CodeInvalid, "the request names a workspace for a secret of one's own")
		}
		return own, c.TokenId, c.TokenName, nil
	case posternv1.SecretScope_SECRET_SCOPE_WORKSPACE:
		if r.Workspace == "" || len(r.Workspace) > maxWorkspace {
			return "", "", "", proto.Errorf(proto.CodeInvalid, "a workspace's name has 1 to %d bytes", maxWorkspace)
		}
		scope, owner, ownerName = workspace, r.Workspace, r.Workspace
	case posternv1.SecretScope_SECRET_SCOPE_ORGANIZATION:
		if r.Workspace != "" {
			return "", "", "", proto.Errorf(proto.CodeInvalid, "the request names a workspace for a secret of the organization")
		}
		scope = organization
	default:
		return "", "", "", proto.Errorf(proto.CodeInvalid, "secrets of hosts are in their agentd.yaml: they can be granted, not set, listed or removed here")
	}
	if change && !operator {
		return "", "", "", proto.Errorf(proto.CodeRoleDenied, "token %s has the role %s: secrets of workspaces and of the organization are operators' to set, remove and grant", c.TokenName, c.Role)
	}
	return scope, owner, ownerName, nil
}

func (s *Service) audit(ctx context.Context, c Caller, action, target, what string, err error) error {
	e := auditchain.Entry{
		Time: time.Now(), Organization: c.Organization, Actor: "token " + c.TokenName, Role: c.Role, Remote: c.Remote,
		Action: action, Target: target, Statement: what, Verdict: "allowed", Outcome: "done",
	}
	if err != nil {
		e.Outcome, e.Error = "failed", proto.Detail(err).Message
		if code := proto.CodeOf(err); code == proto.CodePolicyDenied || code == proto.CodeRoleDenied {
			e.Outcome, e.Verdict = "denied", "denied"
		}
	}
	return s.cfg.Append(context.WithoutCancel(ctx), e)
}

// told is what an entry says of a secret: its name and whose it is.
func told(scope, owner string) string {
	if scope == workspace {
		return "of workspace " + owner
	}
	if scope == organization {
		return "of the organization"
	}
	return "of token " + owner
}

// Set makes a secret or replaces its value, and gives it to the kernels that have it.
func (s *Service) Set(ctx context.Context, c Caller, r *posternv1.SetSecretRequest) (*posternv1.SetSecretResponse, error) {
	scope, owner, ownerName, err := s.ref(c, r.Ref, true)
	if err == nil {
		err = kernelsecret.CheckValue(r.Ref.Name, r.Value)
	}
	var kept Row
	if err == nil {
		kept, err = s.put(ctx, c, Row{Organization: c.Organization, Scope: scope, Owner: owner, OwnerName: ownerName, Name: r.Ref.Name}, r.Value)
	}
	if aerr := s.audit(ctx, c, "secret.set", clip(r.GetRef().GetName()), told(scope, owner), err); err == nil {
		err = aerr
	}
	if err != nil {
		return nil, err
	}
	kernels, err := s.cfg.Store.KernelsWithSecret(ctx, c.Organization, kept.ID, kept.Name)
	if err != nil {
		return nil, err
	}
	return &posternv1.SetSecretResponse{Secret: describe(kept), Kernels: s.pushAll(ctx, c, kernels, kept.Name)}, nil
}

func (s *Service) put(ctx context.Context, c Caller, row Row, value []byte) (Row, error) {
	box, err := s.cfg.Box(c.Organization)
	if err != nil {
		return Row{}, err
	}
	if row.Sealed, err = box.Seal(value, About(row)); err != nil {
		return Row{}, err
	}
	row.ID, row.Changed, row.ChangedBy = newID(), time.Now(), c.TokenName
	return s.cfg.Store.PutSecret(ctx, row)
}

// List lists what the caller may know of.
func (s *Service) List(ctx context.Context, c Caller) (*posternv1.ListSecretsResponse, error) {
	rows, err := s.cfg.Store.Secrets(ctx, c.Organization)
	if err != nil {
		return nil, err
	}
	grants, err := s.cfg.Store.SecretGrants(ctx, c.Organization)
	if err != nil {
		return nil, err
	}
	operator := s.cfg.Operator(c.Role)
	mine := map[string]bool{}
	if !operator {
		kernels, err := s.cfg.Store.KernelsWithSecrets(ctx, c.Organization, "")
		if err != nil {
			return nil, err
		}
		for _, k := range kernels {
			mine[k.ID] = k.Owner.GetTokenId() == c.TokenId
		}
	}
	visible := func(g Grant) bool { return operator || g.Token == c.TokenId || mine[g.Kernel] }
	of := map[string][]*posternv1.SecretGrant{}
	var fromHosts []string
	for _, g := range grants {
		if !visible(g) {
			continue
		}
		key := g.Secret
		if key == "" {
			key = "host " + g.Name
			if !slices.Contains(fromHosts, g.Name) {
				fromHosts = append(fromHosts, g.Name)
			}
		}
		of[key] = append(of[key], &posternv1.SecretGrant{KernelId: g.Kernel, TokenId: g.Token, TokenName: g.TokenName})
	}
	out := &posternv1.ListSecretsResponse{}
	for _, row := range rows {
		if row.Scope == own && row.Owner != c.TokenId && !operator {
			continue
		}
		d := describe(row)
		d.Grants = of[row.ID]
		out.Secrets = append(out.Secrets, d)
	}
	slices.Sort(fromHosts)
	for _, name := range fromHosts {
		out.Secrets = append(out.Secrets, &posternv1.Secret{
			Ref: &posternv1.SecretRef{Name: name, Scope: posternv1.SecretScope_SECRET_SCOPE_HOST}, Grants: of["host "+name],
		})
	}
	return out, nil
}

// Remove removes a secret and takes it from the kernels that have it.
func (s *Service) Remove(ctx context.Context, c Caller, r *posternv1.RemoveSecretRequest) (*posternv1.RemoveSecretResponse, error) {
	scope, owner, _, err := s.ref(c, r.Ref, true)
	var row Row
	if err == nil {
		row, err = s.cfg.Store.Secret(ctx, c.Organization, scope, owner, r.Ref.Name)
	}
	var kernels []Kernel
	if err == nil {
		kernels, err = s.cfg.Store.KernelsWithSecret(ctx, c.Organization, row.ID, row.Name)
	}
	if err == nil {
		err = s.cfg.Store.DeleteSecret(ctx, c.Organization, row.ID)
	}
	if aerr := s.audit(ctx, c, "secret.rm", clip(r.GetRef().GetName()), told(scope, owner), err); err == nil {
		err = aerr
	}
	if err != nil {
		return nil, err
	}
	return &posternv1.RemoveSecretResponse{Kernels: s.pushAll(ctx, c, kernels, "")}, nil
}

func describe(r Row) *posternv1.Secret {
	d := &posternv1.Secret{
		Ref: &posternv1.SecretRef{Name: r.Name}, Created: timestamppb.New(r.Created), Changed: timestamppb.New(r.Changed), ChangedBy: r.ChangedBy,
	}
	switch r.Scope {
	case own:
		d.Ref.Scope, d.Owner, d.OwnerName = posternv1.SecretScope_SECRET_SCOPE_OWN, r.Owner, r.OwnerName
	case workspace:
		d.Ref.Scope, d.Ref.Workspace = posternv1.SecretScope_SECRET_SCOPE_WORKSPACE, r.Owner
	default:
		d.Ref.Scope = posternv1.SecretScope_SECRET_SCOPE_ORGANIZATION
	}
	return d
}

// clip bounds a caller's text within an entry.
func clip(text string) string {
	if len(text) > 80 {
		return text[:80]
	}
	return text
}
