package store_test

import (
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestKernels(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		a, b := tenants(t, s)
		agent, _, err := join(s, a, newKey(t, s, a, 9).Id, "edge")
		if err != nil {
			t.Fatal(err)
		}
		other, _, err := join(s, a, newKey(t, s, a, 9).Id, "edge-2")
		if err != nil {
			t.Fatal(err)
		}
		owner := &posternv1.Principal{Organization: a, TokenId: "tok_1", TokenName: "ana"}
		k := store.KernelRow{ID: "k1", Agent: agent.Id, Owner: owner, Spec: "python3", Started: now}
		for range 2 { // once more changes nothing
			if err := s.InsertKernel(ctx, k); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.InsertKernel(ctx, store.KernelRow{ID: "k0\x00\xff", Agent: other.Id, Owner: owner, Spec: "r", Language: "R", Started: now.Add(time.Second)}); err != nil {
			t.Fatal(err)
		}
		if err := s.DescribeKernel(ctx, a, "k1", "python3", "python"); err != nil {
			t.Fatal(err)
		}
		if err := s.DescribeKernel(ctx, b, "k1", "evil", "evil"); err != nil {
			t.Fatal(err)
		}
		got := must(s.Kernel(ctx, a, "k1"))(t)
		if got.Agent != agent.Id || got.Owner.TokenId != "tok_1" || got.Owner.TokenName != "ana" || got.Owner.Organization != a || got.Spec != "python3" || got.Language != "python" || !got.Started.Equal(now.Truncate(time.Millisecond)) {
			t.Errorf("got %+v", got)
		}
		for _, miss := range [][2]string{{b, "k1"}, {a, "k2"}, {a, "\x00"}} {
			_, err := s.Kernel(ctx, miss[0], miss[1])
			wantCode(t, err, proto.CodeNotFound)
		}
		// A kernel that moves takes its sessions along; another organization moves nothing.
		if err := s.PutKernelSession(ctx, owner, agent.Id, store.KernelSession{ID: "moves", Kernel: "k1", Path: "m.ipynb"}, now); err != nil {
			t.Fatal(err)
		}
		for _, move := range [][2]string{{b, other.Id}, {a, other.Id}} {
			if err := s.MoveKernel(ctx, move[0], "k1", move[1]); err != nil {
				t.Fatal(err)
			}
			want := agent.Id
			if move[0] == a {
				want = other.Id
			}
			if k := must(s.Kernel(ctx, a, "k1"))(t); k.Agent != want {
				t.Errorf("on %s, want %s", k.Agent, want)
			}
			if all := must(s.KernelSessions(ctx, owner, want))(t); len(all) != 1 || all[0].ID != "moves" {
				t.Errorf("sessions: %+v", all)
			}
		}
		if err := s.MoveKernel(ctx, a, "k1", agent.Id); err != nil {
			t.Fatal(err)
		}
		if err := s.DeleteKernelSession(ctx, owner, agent.Id, "moves"); err != nil {
			t.Fatal(err)
		}
		if all := must(s.Kernels(ctx, a, ""))(t); len(all) != 2 || all[0].ID != "k1" {
			t.Errorf("all: got %+v", all)
		}
		if mine := must(s.Kernels(ctx, a, other.Id))(t); len(mine) != 1 || mine[0].Language != "R" {
			t.Errorf("of one agent: got %+v", mine)
		}
		if none := must(s.Kernels(ctx, b, ""))(t); len(none) != 0 {
			t.Errorf("another organization sees %+v", none)
		}

		session := store.KernelSession{ID: "s1", Kernel: "k1", Path: "a.ipynb", Name: "a", Type: "notebook"}
		if err := s.PutKernelSession(ctx, owner, agent.Id, session, now); err != nil {
			t.Fatal(err)
		}
		session.Path = "b\x00.ipynb"
		if err := s.PutKernelSession(ctx, owner, agent.Id, session, now); err != nil {
			t.Fatal(err)
		}
		stranger := &posternv1.Principal{Organization: a, TokenId: "tok_2"}
		wantCode(t, s.PutKernelSession(ctx, stranger, agent.Id, session, now), proto.CodeNotFound)
		wantCode(t, s.PutKernelSession(ctx, owner, other.Id, session, now), proto.CodeNotFound)
		if err := s.InsertKernel(ctx, store.KernelRow{ID: "k3", Agent: agent.Id, Owner: stranger, Started: now}); err != nil {
			t.Fatal(err)
		}
		wantCode(t, s.PutKernelSession(ctx, stranger, agent.Id, store.KernelSession{ID: "s1", Kernel: "k3"}, now), proto.CodeNotFound)
		wantCode(t, s.PutKernelSession(ctx, owner, agent.Id, store.KernelSession{ID: "s2", Kernel: "k1", Path: strings.Repeat("x", 5000)}, now), proto.CodeInvalid)
		if all := must(s.KernelSessions(ctx, owner, agent.Id))(t); len(all) != 1 || all[0].ID != "s1" || all[0].Path != "b\uFFFD.ipynb" || all[0].Name != "a" || all[0].Type != "notebook" || all[0].Kernel != "k1" {
			t.Errorf("sessions: got %+v", all)
		}
		if all := must(s.KernelSessions(ctx, stranger, agent.Id))(t); len(all) != 0 {
			t.Errorf("a stranger sees %+v", all)
		}
		wantCode(t, s.DeleteKernelSession(ctx, stranger, agent.Id, "s1"), proto.CodeNotFound)
		if err := s.DeleteKernelSession(ctx, owner, agent.Id, "s1"); err != nil {
			t.Fatal(err)
		}
		wantCode(t, s.DeleteKernelSession(ctx, owner, agent.Id, "s1"), proto.CodeNotFound)

		// Sessions go with their kernel.
		if err := s.PutKernelSession(ctx, owner, agent.Id, session, now); err != nil {
			t.Fatal(err)
		}
		if err := s.DeleteKernel(ctx, b, "k1"); err != nil {
			t.Fatal(err)
		}
		must(s.Kernel(ctx, a, "k1"))(t)
		for range 2 {
			if err := s.DeleteKernel(ctx, a, "k1"); err != nil {
				t.Fatal(err)
			}
		}
		if all := must(s.KernelSessions(ctx, owner, agent.Id))(t); len(all) != 0 {
			t.Errorf("sessions outlived their kernel: %+v", all)
		}
	})
}
