package host

import (
	"context"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	"github.com/postern-dev/postern/proto/kernelsecret"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// actionKernelSecrets is the action in the audit log; its entries have names alone.
const actionKernelSecrets = "kernel.secrets"

// KernelSecrets gives kernels secrets. Its errors carry codes of package proto and nothing
// of a value.
type KernelSecrets interface {
	// RefuseSecret asks the policy: why a kernel may not have a secret, or empty.
	RefuseSecret(name string, fromHost bool) string
	// ReadSecret reads one of the host's own.
	ReadSecret(ctx context.Context, name string) ([]byte, error)
	// PutSecrets says all that a kernel is to have; the values are there, also of the
	// host's own.
	PutSecrets(ctx context.Context, id string, all []*posternv1.KernelSecret) (*posternv1.PutKernelSecretsResponse, error)
}

// secretRPC is the SecretHostService.
type secretRPC struct{ h *Host }

var _ posternv1connect.SecretHostServiceHandler = secretRPC{}

// PutKernelSecrets gives a kernel what the policy lets through of a request.
func (s secretRPC) PutKernelSecrets(ctx context.Context, r *connect.Request[posternv1.PutKernelSecretsRequest]) (*connect.Response[posternv1.PutKernelSecretsResponse], error) {
	h, m, began := s.h, r.Msg, time.Now()
	defer func() {
		for _, secret := range m.Secrets {
			clear(secret.Value)
		}
	}()
	entry := kernelEntry(actionKernelSecrets, m.KernelId, m.Principal)
	// What was begun is finished: a kernel has all of it, or what it had.
	out, err := h.putSecrets(context.WithoutCancel(ctx), m, &entry)
	if err != nil || !out.Unchanged || len(out.Refused) > 0 {
		h.note(entry, began, err)
	}
	if err != nil {
		return nil, proto.ConnectError(err)
	}
	return connect.NewResponse(out), nil
}

func (h *Host) putSecrets(ctx context.Context, m *posternv1.PutKernelSecretsRequest, entry *auditchain.Entry) (*posternv1.PutKernelSecretsResponse, error) {
	if _, err := h.kernelFor(ctx, m.KernelId, m.Principal, false); err != nil {
		return nil, err
	}
	if len(m.Secrets) > kernelsecret.MaxPerKernel {
		return nil, proto.Errorf(proto.CodeInvalid, "a kernel has at most %d secrets", kernelsecret.MaxPerKernel)
	}
	seen := map[string]bool{}
	for _, secret := range m.Secrets {
		err := kernelsecret.CheckName(secret.Name)
		if err == nil && !secret.FromHost {
			err = kernelsecret.CheckValue(secret.Name, secret.Value)
		}
		if err == nil && seen[secret.Name] {
			err = proto.Errorf(proto.CodeInvalid, "secret %s is there twice", secret.Name)
		}
		if err != nil {
			return nil, err
		}
		seen[secret.Name] = true
	}
	if err := h.settle(); err != nil {
		return nil, err
	}
	var refused []*posternv1.SecretRefusal
	var given, denied []string
	var all []*posternv1.KernelSecret
	for _, secret := range m.Secrets {
		reason := h.cfg.Secrets.RefuseSecret(secret.Name, secret.FromHost)
		if reason == "" && secret.FromHost {
			value, err := h.cfg.Secrets.ReadSecret(ctx, secret.Name)
			if err == nil {
				err = kernelsecret.CheckValue(secret.Name, value)
			}
			if err != nil {
				reason = proto.Detail(err).Message
			}
			secret.Value = value
		}
		if reason != "" {
			refused, denied = append(refused, &posternv1.SecretRefusal{Name: secret.Name, Reason: reason}), append(denied, secret.Name)
			continue
		}
		all, given = append(all, secret), append(given, secret.Name)
	}
	entry.Statement = "has: " + strings.Join(given, " ")
	if len(denied) > 0 {
		entry.Statement += "; refused: " + strings.Join(denied, " ")
		if len(given) == 0 {
			entry.Verdict = "denied"
		}
	}
	out, err := h.cfg.Secrets.PutSecrets(ctx, m.KernelId, all)
	if err != nil {
		return nil, err
	}
	out.Refused = refused
	return out, nil
}

// NoteKernelSecrets records that the host itself changed a kernel's secrets: by its own
// policy, or since they were set anew where it reads them.
func (h *Host) NoteKernelSecrets(k *posternv1.Kernel, names []string) {
	h.finish(auditchain.Entry{Action: actionKernelSecrets, Actor: "host", Target: k.GetId(), Verdict: "allowed", Outcome: "done", Statement: "has: " + strings.Join(names, " ")}, true)
}
