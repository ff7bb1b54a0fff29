package main

import (
	"context"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/api"
	"github.com/postern-dev/postern/controlplane/hub"
	"github.com/postern-dev/postern/controlplane/kernel"
	"github.com/postern-dev/postern/controlplane/secret"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/controlplane/token"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

var (
	_ secret.Agent   = secretAgent{}
	_ secret.Store   = secretStore{}
	_ kernel.Secrets = kernelSecrets{}
	_ api.Secrets    = secretAPI{}
)

// newSecrets makes what keeps kernels' secrets.
func (s *Server) newSecrets() *secret.Service {
	return secret.New(secret.Config{
		Logger: s.log, Store: secretStore{s.store}, Append: s.audit.Append,
		Operator: func(role string) bool { return token.Role(role).Includes(token.Operator) },
		Box: func(organization string) (secret.Box, error) {
			return s.ca.Box(secretsOf(organization)), nil
		},
		Connect: func(id string) (secret.Agent, error) {
			if s.refusing.Load() {
				return nil, errDraining
			}
			l, err := s.hub.Agent(id)
			if err != nil {
				return nil, err
			}
			return secretAgent{l}, nil
		},
	})
}

// secretsOf is the purpose for which an organization's secrets are sealed.
func secretsOf(organization string) string { return "secrets of organization " + organization }

// secretAgent gives an agent secrets.
type secretAgent struct{ *hub.Link }

// PutKernelSecrets implements secret.Agent.
func (a secretAgent) PutKernelSecrets(ctx context.Context, r *posternv1.PutKernelSecretsRequest) (*posternv1.PutKernelSecretsResponse, error) {
	return unwrap(a.Link, func() (*connect.Response[posternv1.PutKernelSecretsResponse], error) {
		resp, err := posternv1connect.NewSecretHostServiceClient(a.HTTP(tunnel.Control), "http://agent").PutKernelSecrets(ctx, connect.NewRequest(r))
		if connect.CodeOf(err) == connect.CodeUnimplemented {
			return nil, proto.Errorf(proto.CodeVersionMismatch, "agent %s is of a version without secrets for kernels: upgrade it", a.Name)
		}
		return resp, err
	})
}

// secretStore keeps secrets.
type secretStore struct{ *store.Store }

func (s secretStore) PutSecret(ctx context.Context, r secret.Row) (secret.Row, error) {
	out, err := s.Store.PutSecret(ctx, store.SecretRow(r))
	return secret.Row(out), err
}

func (s secretStore) Secret(ctx context.Context, organization, scope, owner, name string) (secret.Row, error) {
	out, err := s.Store.Secret(ctx, organization, scope, owner, name)
	return secret.Row(out), err
}

func (s secretStore) Secrets(ctx context.Context, organization string) ([]secret.Row, error) {
	rows, err := s.Store.Secrets(ctx, organization)
	return secretRows(rows), err
}

func secretRows(rows []store.SecretRow) []secret.Row {
	out := make([]secret.Row, len(rows))
	for i, r := range rows {
		out[i] = secret.Row(r)
	}
	return out
}

func (s secretStore) PutSecretGrant(ctx context.Context, organization string, g secret.Grant, now time.Time) error {
	return s.Store.PutSecretGrant(ctx, organization, store.SecretGrantRow(g), now)
}

func (s secretStore) DeleteSecretGrant(ctx context.Context, organization string, g secret.Grant) error {
	return s.Store.DeleteSecretGrant(ctx, organization, store.SecretGrantRow(g))
}

func (s secretStore) SecretGrants(ctx context.Context, organization string) ([]secret.Grant, error) {
	rows, err := s.Store.SecretGrants(ctx, organization)
	out := make([]secret.Grant, len(rows))
	for i, r := range rows {
		out[i] = secret.Grant(r)
	}
	return out, err
}

func (s secretStore) SecretsOfKernel(ctx context.Context, organization, id, owner string) ([]secret.Row, []string, error) {
	rows, names, err := s.Store.SecretsOfKernel(ctx, organization, id, owner)
	return secretRows(rows), names, err
}

func secretKernels(rows []store.KernelRow) []secret.Kernel {
	out := make([]secret.Kernel, len(rows))
	for i, r := range rows {
		out[i] = secret.Kernel{ID: r.ID, Agent: r.Agent, Owner: r.Owner}
	}
	return out
}

func (s secretStore) KernelsWithSecret(ctx context.Context, organization, id, name string) ([]secret.Kernel, error) {
	rows, err := s.Store.KernelsWithSecret(ctx, organization, id, name)
	return secretKernels(rows), err
}

func (s secretStore) KernelsWithSecrets(ctx context.Context, organization, agent string) ([]secret.Kernel, error) {
	rows, err := s.Store.KernelsWithSecrets(ctx, organization, agent)
	return secretKernels(rows), err
}

func (s secretStore) Kernel(ctx context.Context, organization, id string) (secret.Kernel, error) {
	r, err := s.Store.Kernel(ctx, organization, id)
	return secret.Kernel{ID: r.ID, Agent: r.Agent, Owner: r.Owner}, err
}

func (s secretStore) AgentName(ctx context.Context, organization, id string) string {
	agent, err := s.FindAgent(ctx, organization, id)
	if err != nil {
		return id
	}
	return agent.Name
}

func (s secretStore) Token(ctx context.Context, organization, idOrName string) (id, name string, err error) {
	list, err := s.ListTokens(ctx, organization)
	if err != nil {
		return "", "", err
	}
	for _, t := range list {
		if t.Revoked == nil && (t.Id == idOrName || t.Name == idOrName) {
			return t.Id, t.Name, nil
		}
	}
	return "", "", proto.Errorf(proto.CodeNotFound, "token %.80q not found", idOrName)
}

// kernelSecrets gives kernels what they are granted.
type kernelSecrets struct{ *secret.Service }

// Started implements kernel.Secrets.
func (k kernelSecrets) Started(ctx context.Context, c kernel.Caller, r kernel.Row, wanted, workspaces []string) ([]string, error) {
	return k.Service.Started(ctx, secret.Caller(c), secret.Kernel{ID: r.ID, Agent: r.Agent, Owner: r.Owner}, wanted, workspaces)
}

// Forked implements kernel.Secrets.
func (k kernelSecrets) Forked(ctx context.Context, c kernel.Caller, from string, fork kernel.Row) error {
	return k.Service.Forked(ctx, secret.Caller(c), from, secret.Kernel{ID: fork.ID, Agent: fork.Agent, Owner: fork.Owner})
}

// Moved implements kernel.Secrets.
func (k kernelSecrets) Moved(ctx context.Context, r kernel.Row) {
	k.Service.Moved(ctx, secret.Kernel{ID: r.ID, Agent: r.Agent, Owner: r.Owner})
}

// secretAPI is the secrets for the API.
type secretAPI struct{ s *secret.Service }

func secretCaller(c api.Caller) secret.Caller {
	return secret.Caller{Principal: c.Principal, Remote: c.Remote}
}

// SetSecret implements api.Secrets.
func (a secretAPI) SetSecret(ctx context.Context, c api.Caller, r *posternv1.SetSecretRequest) (*posternv1.SetSecretResponse, error) {
	return a.s.Set(ctx, secretCaller(c), r)
}

// ListSecrets implements api.Secrets.
func (a secretAPI) ListSecrets(ctx context.Context, c api.Caller) (*posternv1.ListSecretsResponse, error) {
	return a.s.List(ctx, secretCaller(c))
}

// RemoveSecret implements api.Secrets.
func (a secretAPI) RemoveSecret(ctx context.Context, c api.Caller, r *posternv1.RemoveSecretRequest) (*posternv1.RemoveSecretResponse, error) {
	return a.s.Remove(ctx, secretCaller(c), r)
}

// GrantSecret implements api.Secrets.
func (a secretAPI) GrantSecret(ctx context.Context, c api.Caller, r *posternv1.GrantSecretRequest) (*posternv1.GrantSecretResponse, error) {
	return a.s.Grant(ctx, secretCaller(c), r)
}
