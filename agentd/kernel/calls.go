package kernel

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	gproto "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/agentd/kernel/internal/shim"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// find finds a kernel that has started.
func (m *Manager) find(ctx context.Context, id string) (*kernel, error) {
	m.mu.Lock()
	k := m.kernels[id]
	m.mu.Unlock()
	if k == nil {
		return nil, proto.Errorf(proto.CodeNotFound, "this host has no kernel %.64q", id)
	}
	select {
	case <-k.ready:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if k.failed != nil {
		return nil, proto.Errorf(proto.CodeNotFound, "kernel %s did not start", id)
	}
	return k, nil
}

// Get is a kernel as it is.
func (m *Manager) Get(ctx context.Context, id string) (*posternv1.Kernel, error) {
	k, err := m.find(ctx, id)
	if err != nil {
		return nil, err
	}
	short, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if now, err := k.agent.Kernel(short); err == nil {
		return now, nil
	}
	return m.known(k), nil
}

// known is a kernel as it was when its shim last spoke.
func (m *Manager) known(k *kernel) *posternv1.Kernel {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out *posternv1.Kernel
	if k.last != nil {
		out, _ = gproto.Clone(k.last).(*posternv1.Kernel)
	} else {
		out = &posternv1.Kernel{Spec: k.spec.Name, Language: k.spec.Language, State: posternv1.KernelState_KERNEL_STATE_CHANGING, Started: timestamppb.New(k.spec.Created)}
		owner := &posternv1.Principal{}
		if protojson.Unmarshal(k.spec.Owner, owner) == nil {
			out.Owner = owner
		}
	}
	out.Id = k.spec.ID
	if k.lost != "" {
		out.State, out.Reason = posternv1.KernelState_KERNEL_STATE_CHANGING, k.lost
	}
	return out
}

// List is all kernels, by id, as their shims last told.
func (m *Manager) List() []*posternv1.Kernel {
	m.mu.Lock()
	var all []*kernel
	for _, k := range m.kernels {
		all = append(all, k)
	}
	m.mu.Unlock()
	var out []*posternv1.Kernel
	for _, k := range all {
		select {
		case <-k.ready:
		default: // it is being started
		}
		out = append(out, m.known(k))
	}
	slices.SortFunc(out, func(a, b *posternv1.Kernel) int { return strings.Compare(a.Id, b.Id) })
	return out
}

// Interrupt returns when the interrupt has been delivered.
func (m *Manager) Interrupt(ctx context.Context, id string) (*posternv1.Kernel, error) {
	return m.ask(ctx, id, (*shim.Agent).Interrupt)
}

// Restart ends the kernel's processes and starts them anew.
func (m *Manager) Restart(ctx context.Context, id string) (*posternv1.Kernel, error) {
	return m.ask(ctx, id, (*shim.Agent).Restart)
}

func (m *Manager) ask(ctx context.Context, id string, what func(*shim.Agent, context.Context) (*posternv1.Kernel, error)) (*posternv1.Kernel, error) {
	k, err := m.find(ctx, id)
	if err != nil {
		return nil, err
	}
	now, err := what(k.agent, ctx)
	if errors.Is(err, shim.ErrNoShim) || errors.Is(err, io.EOF) {
		return nil, proto.Errorf(proto.CodeUnavailable, "kernel %s: its shim is being replaced: try again", id)
	}
	return now, err
}

// Channels opens a kernel's channels: the stream is the caller's, of package
// kernelstream. ctx bounds the opening alone.
func (m *Manager) Channels(ctx context.Context, r *posternv1.KernelChannelsRequest) (io.ReadWriteCloser, error) {
	k, err := m.find(ctx, r.KernelId)
	if err != nil {
		return nil, err
	}
	stream, err := kernelstream.Dial(ctx, k.agent, r)
	if errors.Is(err, shim.ErrNoShim) || errors.Is(err, io.EOF) {
		return nil, proto.Errorf(proto.CodeUnavailable, "kernel %s: its shim is being replaced: try again", r.KernelId)
	}
	return stream, err
}

// Waiting is how many kernels of the pool are ready to be taken.
func (m *Manager) Waiting() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for _, k := range m.pool {
		if k.last != nil && k.last.State == posternv1.KernelState_KERNEL_STATE_IDLE {
			n++
		}
	}
	return n
}
