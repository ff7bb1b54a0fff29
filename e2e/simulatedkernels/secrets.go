package simulatedkernels

import (
	"context"
	"maps"
	"slices"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// HostSecret is the name of the one secret that this host reads itself.
const HostSecret = "FROM_VAULT"

// secretHost is the SecretHostService.
type secretHost struct{ h *Host }

var _ posternv1connect.SecretHostServiceHandler = secretHost{}

// RefuseSecrets makes every request with secrets fail; nil ends that.
func (h *Host) RefuseSecrets(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refuseSecrets = err
}

// Secrets are what a kernel was given last; nil: nothing.
func (h *Host) Secrets(id string) map[string]string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.secrets[id])
}

// PutKernelSecrets implements SecretHostService.
func (s secretHost) PutKernelSecrets(_ context.Context, req *connect.Request[posternv1.PutKernelSecretsRequest]) (*connect.Response[posternv1.PutKernelSecretsResponse], error) {
	h, m := s.h, req.Msg
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.kernels[m.KernelId] == nil:
		return reply[posternv1.PutKernelSecretsResponse](nil, proto.Errorf(proto.CodeNotFound, "kernel %q not found", m.KernelId))
	case h.refuseSecrets != nil && len(m.Secrets) > 0:
		return reply[posternv1.PutKernelSecretsResponse](nil, h.refuseSecrets)
	}
	out := &posternv1.PutKernelSecretsResponse{}
	given := map[string]string{}
	for _, secret := range m.Secrets {
		switch {
		case !secret.FromHost:
			given[secret.Name] = string(secret.Value)
		case secret.Name == HostSecret:
			given[secret.Name] = "read by the host"
		default:
			out.Refused = append(out.Refused, &posternv1.SecretRefusal{Name: secret.Name, Reason: "this host has no secret of that name"})
		}
	}
	out.Unchanged = maps.Equal(h.secrets[m.KernelId], given)
	h.secrets[m.KernelId] = given
	return reply(out, nil)
}

// SecretNames are the names of a kernel's, in order.
func (h *Host) SecretNames(id string) []string {
	return slices.Sorted(maps.Keys(h.Secrets(id)))
}
