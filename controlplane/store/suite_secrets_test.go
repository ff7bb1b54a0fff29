package store_test

import (
	"slices"
	"testing"
	"time"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func TestSecrets(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		a, b := tenants(t, s)
		agent, _, err := join(s, a, newKey(t, s, a, 9).Id, "edge")
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range [][2]string{{"k1", "tok_1"}, {"k2", "tok_1"}, {"k3", "tok_2"}} {
			err := s.InsertKernel(ctx, store.KernelRow{ID: k[0], Agent: agent.Id, Owner: &posternv1.Principal{Organization: a, TokenId: k[1], TokenName: "n"}, Spec: "python3", Started: now})
			if err != nil {
				t.Fatal(err)
			}
		}
		row := func(id, scope, owner, name string) store.SecretRow {
			return store.SecretRow{ID: id, Organization: a, Scope: scope, Owner: owner, OwnerName: "n", Name: name, Sealed: []byte{0, 255, 1}, Changed: now, ChangedBy: "ana"}
		}
		own := must(s.PutSecret(ctx, row("s1", store.SecretOwn, "tok_1", "KEY")))(t)
		if own.ID != "s1" || !own.Created.Equal(now.Truncate(time.Millisecond)) || !slices.Equal(own.Sealed, []byte{0, 255, 1}) {
			t.Errorf("got %+v", own)
		}
		again := row("s9", store.SecretOwn, "tok_1", "KEY")
		again.Sealed, again.Changed, again.ChangedBy = []byte("new"), now.Add(time.Hour), "bo"
		if got := must(s.PutSecret(ctx, again))(t); got.ID != "s1" || string(got.Sealed) != "new" || !got.Created.Equal(own.Created) || !got.Changed.After(own.Changed) || got.ChangedBy != "bo" {
			t.Errorf("set anew: %+v", got)
		}
		must(s.PutSecret(ctx, row("s2", store.SecretWorkspace, "reports", "KEY")))(t)
		must(s.PutSecret(ctx, row("s3", store.SecretOrganization, "", "KEY")))(t)
		must(s.PutSecret(ctx, row("s4", store.SecretOwn, "tok_2", "KEY")))(t)
		if got := must(s.Secret(ctx, a, store.SecretWorkspace, "reports", "KEY"))(t); got.ID != "s2" {
			t.Errorf("found %+v", got)
		}
		for _, miss := range [][4]string{{b, "own", "tok_1", "KEY"}, {a, "own", "tok_3", "KEY"}, {a, "own", "tok_1", "\x00"}} {
			_, err := s.Secret(ctx, miss[0], miss[1], miss[2], miss[3])
			wantCode(t, err, proto.CodeNotFound)
		}
		if all, none := must(s.Secrets(ctx, a))(t), must(s.Secrets(ctx, b))(t); len(all) != 4 || len(none) != 0 {
			t.Errorf("lists have %d and %d", len(all), len(none))
		}

		grant := func(g store.SecretGrantRow) {
			t.Helper()
			for range 2 { // once more changes nothing
				if err := s.PutSecretGrant(ctx, a, g, now); err != nil {
					t.Fatal(err)
				}
			}
		}
		grant(store.SecretGrantRow{Secret: "s1", Name: "KEY", Kernel: "k1"})
		grant(store.SecretGrantRow{Secret: "s3", Name: "KEY", Token: "tok_1", TokenName: "n"})
		grant(store.SecretGrantRow{Name: "HOST", Kernel: "k1"})
		if err := s.PutKernelWorkspaces(ctx, "k3", []string{"reports", "reports"}); err != nil {
			t.Fatal(err)
		}
		for _, g := range []store.SecretGrantRow{{Secret: "nope", Name: "KEY", Kernel: "k1"}, {Secret: "s1", Name: "KEY", Kernel: "nope"}} {
			wantCode(t, s.PutSecretGrant(ctx, a, g, now), proto.CodeNotFound)
			wantCode(t, s.PutSecretGrant(ctx, b, store.SecretGrantRow{Secret: "s1", Name: "KEY", Kernel: "k1"}, now), proto.CodeNotFound)
			wantCode(t, s.DeleteSecretGrant(ctx, a, g), proto.CodeNotFound)
		}
		if got := must(s.SecretGrants(ctx, a))(t); len(got) != 3 {
			t.Errorf("grants: %+v", got)
		}
		have := func(kernel, token string, want ...string) {
			t.Helper()
			rows, host, err := s.SecretsOfKernel(ctx, a, kernel, token)
			if err != nil {
				t.Fatal(err)
			}
			got := host
			for _, r := range rows {
				got = append(got, r.ID)
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("kernel %s has %v, want %v", kernel, got, want)
			}
		}
		have("k1", "tok_1", "HOST", "s1", "s3")
		have("k2", "tok_1", "s3")
		have("k3", "tok_2", "s2")
		of := func(id, name string, want ...string) {
			t.Helper()
			var got []string
			for _, k := range must(s.KernelsWithSecret(ctx, a, id, name))(t) {
				got = append(got, k.ID)
			}
			if !slices.Equal(got, want) {
				t.Errorf("secret %s %s is of %v, want %v", id, name, got, want)
			}
		}
		of("s1", "KEY", "k1")
		of("s2", "KEY", "k3")
		of("s3", "KEY", "k1", "k2")
		of("s4", "KEY")
		of("", "HOST", "k1")
		if got := must(s.KernelsWithSecrets(ctx, a, agent.Id))(t); len(got) != 3 {
			t.Errorf("kernels with secrets: %+v", got)
		}
		if err := s.CopyKernelGrants(ctx, a, "k1", "k2", now); err != nil {
			t.Fatal(err)
		}
		have("k2", "tok_1", "HOST", "s1", "s3")
		if err := s.DeleteSecret(ctx, b, "s1"); err != nil {
			t.Fatal(err)
		}
		have("k2", "tok_1", "HOST", "s1", "s3")
		if err := s.DeleteSecret(ctx, a, "s1"); err != nil {
			t.Fatal(err)
		}
		have("k2", "tok_1", "HOST", "s3")
		if err := s.DeleteSecretGrant(ctx, a, store.SecretGrantRow{Name: "HOST", Kernel: "k2"}); err != nil {
			t.Fatal(err)
		}
		have("k2", "tok_1", "s3")
		if err := s.DeleteKernel(ctx, a, "k1"); err != nil { // its grants go with it
			t.Fatal(err)
		}
		of("", "HOST")

		// A token's secrets and grants end with it.
		if err := s.InsertToken(ctx, a, &posternv1.Token{Id: "tok_1", Name: "n1", Role: "analyst", Created: timestamppb.New(now)}, [32]byte{1}); err != nil {
			t.Fatal(err)
		}
		must(s.PutSecret(ctx, row("s5", store.SecretOwn, "tok_1", "KEY")))(t)
		must(s.RevokeToken(ctx, a, "tok_1", now))(t)
		_, err = s.Secret(ctx, a, store.SecretOwn, "tok_1", "KEY")
		wantCode(t, err, proto.CodeNotFound)
		have("k2", "tok_1")
	})
}
