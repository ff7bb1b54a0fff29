package api

import (
	"context"

	"connectrpc.com/connect"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Secrets keeps secrets for kernels; it writes the audit entries itself. No answer has a
// value.
type Secrets interface {
	SetSecret(context.Context, Caller, *posternv1.SetSecretRequest) (*posternv1.SetSecretResponse, error)
	ListSecrets(context.Context, Caller) (*posternv1.ListSecretsResponse, error)
	RemoveSecret(context.Context, Caller, *posternv1.RemoveSecretRequest) (*posternv1.RemoveSecretResponse, error)
	GrantSecret(context.Context, Caller, *posternv1.GrantSecretRequest) (*posternv1.GrantSecretResponse, error)
}

// secrets implements SecretService.
type secrets struct{ api *API }

// SetSecret implements SecretService.
func (s secrets) SetSecret(ctx context.Context, req *connect.Request[posternv1.SetSecretRequest]) (*connect.Response[posternv1.SetSecretResponse], error) {
	return call(ctx, s.api, func(c Caller) (*posternv1.SetSecretResponse, error) {
		defer clear(req.Msg.Value)
		return s.api.cfg.Secrets.SetSecret(ctx, c, req.Msg)
	})
}

// ListSecrets implements SecretService.
func (s secrets) ListSecrets(ctx context.Context, _ *connect.Request[posternv1.ListSecretsRequest]) (*connect.Response[posternv1.ListSecretsResponse], error) {
	return call(ctx, s.api, func(c Caller) (*posternv1.ListSecretsResponse, error) { return s.api.cfg.Secrets.ListSecrets(ctx, c) })
}

// RemoveSecret implements SecretService.
func (s secrets) RemoveSecret(ctx context.Context, req *connect.Request[posternv1.RemoveSecretRequest]) (*connect.Response[posternv1.RemoveSecretResponse], error) {
	return call(ctx, s.api, func(c Caller) (*posternv1.RemoveSecretResponse, error) {
		return s.api.cfg.Secrets.RemoveSecret(ctx, c, req.Msg)
	})
}

// GrantSecret implements SecretService.
func (s secrets) GrantSecret(ctx context.Context, req *connect.Request[posternv1.GrantSecretRequest]) (*connect.Response[posternv1.GrantSecretResponse], error) {
	return call(ctx, s.api, func(c Caller) (*posternv1.GrantSecretResponse, error) {
		return s.api.cfg.Secrets.GrantSecret(ctx, c, req.Msg)
	})
}
