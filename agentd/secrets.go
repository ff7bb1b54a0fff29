package main

import (
	"context"

	"github.com/postern-dev/postern/agentd/host"
	"github.com/postern-dev/postern/agentd/kernel"
	"github.com/postern-dev/postern/agentd/secret"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/kernelsecret"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// secretsKeyFile is the host's own key for kernels' secrets, in its state: 32 random
// bytes, 0600, made when a kernel gets a secret first.
const secretsKeyFile = "secrets.key"

// kernelSecrets gives kernels secrets.
type kernelSecrets struct{ daemon *Daemon }

var _ host.KernelSecrets = kernelSecrets{}

// RefuseSecret implements host.KernelSecrets.
func (s kernelSecrets) RefuseSecret(name string, fromHost bool) string {
	return s.daemon.config.Load().Kernels.KernelSecret(name, fromHost)
}

// ReadSecret implements host.KernelSecrets: from Vault, each time anew.
func (s kernelSecrets) ReadSecret(ctx context.Context, name string) ([]byte, error) {
	v, ok := s.daemon.config.Load().Kernels.Secrets.Vault[name]
	if !ok {
		return nil, proto.Errorf(proto.CodePolicyDenied, "this host has no secret of that name: add it to kernels.secrets.vault in agentd.yaml")
	}
	if s.daemon.vault == nil {
		return nil, proto.Errorf(proto.CodeUnavailable, "agentd started without vault in its configuration: restart it")
	}
	mount, path := secret.VaultRef{KV: v.Path}.Split()
	value, err := s.daemon.vault.KV(ctx, mount, path, v.Key)
	if err != nil {
		return nil, proto.Errorf(proto.CodeUnavailable, "%v", err)
	}
	out := []byte(value.Reveal())
	return out, kernelsecret.CheckValue(name, out)
}

// PutSecrets implements host.KernelSecrets.
func (s kernelSecrets) PutSecrets(ctx context.Context, id string, all []*posternv1.KernelSecret) (*posternv1.PutKernelSecretsResponse, error) {
	list := make([]kernel.Secret, len(all))
	for i, secret := range all {
		list[i] = kernel.Secret{Name: secret.Name, Value: secret.Value, FromHost: secret.FromHost}
	}
	waiting, later, unchanged, err := s.daemon.kernels.PutSecrets(ctx, id, list)
	if err != nil {
		return nil, err
	}
	return &posternv1.PutKernelSecretsResponse{Waiting: waiting, Later: later, Unchanged: unchanged}, nil
}

// noteSecrets records what the host changed by itself.
func (d *Daemon) noteSecrets(k *posternv1.Kernel, names []string, _ bool) {
	if d.host != nil {
		d.host.NoteKernelSecrets(k, names)
	}
}
