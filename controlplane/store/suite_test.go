package store_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// now is a fixed time with more precision than the store keeps.
var now = time.Date(2026, 11, 22, 1, 2, 3, 456_789_000, time.FixedZone("east", 3600))

var ctx = context.Background()

func wantCode(t *testing.T, err error, want proto.Code) {
	t.Helper()
	if proto.CodeOf(err) != want {
		t.Fatalf("got error %v (%v), want %v", err, proto.CodeOf(err), want)
	}
}

func must[T any](value T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

// tenants makes two organizations.
func tenants(t *testing.T, s *store.Store) (string, string) {
	t.Helper()
	a := must(s.CreateOrganization(ctx, "acme", now))(t)
	b := must(s.CreateOrganization(ctx, "bolt", now))(t)
	return a.Id, b.Id
}

func newKey(t *testing.T, s *store.Store, org string, uses uint32) *posternv1.Key {
	t.Helper()
	k := &posternv1.Key{
		Id: proto.NewID("k"), MaxUses: uses, Labels: map[string]string{"zone": "north"},
		Created: timestamppb.New(now), Expires: timestamppb.New(now.Add(time.Hour)), CreatedBy: "token admin",
	}
	if err := s.InsertKey(ctx, org, k, sha256.Sum256([]byte(k.Id))); err != nil {
		t.Fatal(err)
	}
	return k
}

// join registers an agent and returns it with its certificate's serial.
func join(s *store.Store, org, key, name string) (*posternv1.Agent, string, error) {
	a := &posternv1.Agent{Id: proto.NewID(proto.AgentPrefix), Name: name, Hostname: "h\x00\xff", Os: "linux", Arch: "amd64", Kernel: "6.1"}
	serial := proto.NewID("")
	return a, serial, s.RegisterAgent(ctx, org, key, a, serial, "ca", sha256.Sum256([]byte(serial)), now.Add(24*time.Hour), now)
}

func TestOrganizations(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		for range 2 {
			o := must(s.EnsureDefaultOrganization(ctx, now))(t)
			if o.Id != store.DefaultOrganizationID || o.Name != "default" || !o.Created.AsTime().Equal(now.Truncate(time.Millisecond)) {
				t.Fatalf("got %v", o)
			}
		}
		a, _ := tenants(t, s)
		_, err := s.CreateOrganization(ctx, "acme", now)
		wantCode(t, err, proto.CodeAlreadyExists)
		for _, bad := range []string{"", "-a", "a-", "A", "a_b", strings.Repeat("a", 64), "ä", "a\x00"} {
			_, err := s.CreateOrganization(ctx, bad, now)
			wantCode(t, err, proto.CodeInvalid)
		}
		if o := must(s.GetOrganization(ctx, "acme"))(t); o.Id != a {
			t.Errorf("by name: got %v", o)
		}
		_, err = s.GetOrganization(ctx, "nobody\x00\xff")
		wantCode(t, err, proto.CodeNotFound)
		if o := must(s.SetOrganizationDisabled(ctx, "acme", true, now))(t); !o.Disabled {
			t.Error("not disabled")
		}
		_, cut, err := s.CutSince(ctx, now.Add(-time.Second))
		if err != nil || len(cut) != 1 || cut[0] != a {
			t.Errorf("CutSince: got %v, %v", cut, err)
		}
		if o := must(s.SetOrganizationDisabled(ctx, a, false, now))(t); o.Disabled {
			t.Error("not enabled")
		}
		_, err = s.SetOrganizationDisabled(ctx, "default", true, now)
		wantCode(t, err, proto.CodeInvalid)
		if all := must(s.ListOrganizations(ctx))(t); len(all) != 3 || all[0].Name != "acme" {
			t.Errorf("list: got %v", all)
		}
	})
}

func TestTokens(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		a, b := tenants(t, s)
		token := &posternv1.Token{Id: proto.NewID("tok_"), Name: "ci", Role: "admin", Created: timestamppb.New(now), Expires: timestamppb.New(now.Add(time.Hour))}
		hash := sha256.Sum256([]byte("secret"))
		if err := s.InsertToken(ctx, a, token, hash); err != nil {
			t.Fatal(err)
		}
		again := &posternv1.Token{Id: proto.NewID("tok_"), Name: "ci", Role: "viewer", Created: timestamppb.New(now)}
		wantCode(t, s.InsertToken(ctx, a, again, hash), proto.CodeAlreadyExists)
		if err := s.InsertToken(ctx, b, again, hash); err != nil {
			t.Errorf("the same name in another organization: %v", err)
		}
		o, got, gotHash, err := s.TokenByID(ctx, token.Id)
		if err != nil || o.Id != a || got.Name != "ci" || gotHash != hash || !got.Expires.AsTime().Equal(now.Add(time.Hour).Truncate(time.Millisecond)) || got.LastUsed != nil {
			t.Errorf("TokenByID: got %v, %v, %x, %v", o, got, gotHash, err)
		}
		if err := s.TouchToken(ctx, token.Id, now.Add(time.Minute)); err != nil {
			t.Error(err)
		}
		if n := must(s.CountAdmins(ctx, a, now))(t); n != 1 {
			t.Errorf("admins: got %d, want 1", n)
		}
		if n := must(s.CountAdmins(ctx, a, now.Add(2*time.Hour)))(t); n != 0 {
			t.Errorf("admins after expiry: got %d, want 0", n)
		}
		_, err = s.RevokeToken(ctx, b, token.Id, now)
		wantCode(t, err, proto.CodeNotFound)
		first := must(s.RevokeToken(ctx, a, "ci", now))(t)
		second := must(s.RevokeToken(ctx, a, token.Id, now.Add(time.Hour)))(t)
		if first.Revoked == nil || !first.Revoked.AsTime().Equal(second.Revoked.AsTime()) {
			t.Errorf("revoked: got %v, then %v", first.Revoked, second.Revoked)
		}
		_, err = s.RevokeToken(ctx, a, "ci", now)
		wantCode(t, err, proto.CodeNotFound)
		if err := s.InsertToken(ctx, a, &posternv1.Token{Id: proto.NewID("tok_"), Name: "ci", Role: "viewer", Created: timestamppb.New(now)}, hash); err != nil {
			t.Errorf("a revoked token's name is not free: %v", err)
		}
		if all := must(s.ListTokens(ctx, a))(t); len(all) != 2 || all[0].LastUsed == nil {
			t.Errorf("list: got %v", all)
		}
		_, _, _, err = s.TokenByID(ctx, "nope\x00")
		wantCode(t, err, proto.CodeNotFound)
	})
}

func TestKeys(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		a, b := tenants(t, s)
		k := newKey(t, s, a, 2)
		o, got, hash, err := s.KeyByID(ctx, k.Id)
		if err != nil || o.Id != a || got.MaxUses != 2 || got.Labels["zone"] != "north" || got.CreatedBy != "token admin" || hash != sha256.Sum256([]byte(k.Id)) {
			t.Fatalf("KeyByID: got %v, %v, %v", o, got, err)
		}
		_, err = s.RevokeKey(ctx, b, k.Id, now)
		wantCode(t, err, proto.CodeNotFound)
		if got := must(s.RevokeKey(ctx, a, k.Id, now))(t); got.Revoked == nil {
			t.Error("not revoked")
		}
		if got := must(s.ListKeys(ctx, a))(t); len(got) != 1 {
			t.Errorf("list: got %v", got)
		}
		if got := must(s.ListKeys(ctx, b))(t); len(got) != 0 {
			t.Errorf("other organization's list: got %v", got)
		}
	})
}

func TestRegisterAgent(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		org, other := tenants(t, s)
		k := newKey(t, s, org, 3)
		for i, want := range []string{"host", "host-2", "host-3"} {
			a, _, err := join(s, org, k.Id, "host")
			if err != nil {
				t.Fatalf("use %d: %v", i+1, err)
			}
			if a.Name != want || a.Labels["zone"] != "north" || a.Registered == nil {
				t.Errorf("use %d: got %v, want name %s", i+1, a, want)
			}
		}
		_, _, err := join(s, org, k.Id, "host")
		wantCode(t, err, proto.CodeKeyUsedUp)
		_, _, err = join(s, other, k.Id, "host")
		wantCode(t, err, proto.CodeKeyUnknown)
		_, _, err = join(s, org, k.Id, "Bad Name")
		wantCode(t, err, proto.CodeInvalid)

		revoked := newKey(t, s, org, 3)
		must(s.RevokeKey(ctx, org, revoked.Id, now))(t)
		_, _, err = join(s, org, revoked.Id, "host")
		wantCode(t, err, proto.CodeKeyRevoked)

		expired := newKey(t, s, org, 3)
		a := &posternv1.Agent{Id: proto.NewID("agt_"), Name: "late"}
		wantCode(t, s.RegisterAgent(ctx, org, expired.Id, a, "s", "ca", [32]byte{}, now, now.Add(time.Hour)), proto.CodeKeyExpired)

		must(s.SetOrganizationDisabled(ctx, org, true, now))(t)
		_, _, err = join(s, org, expired.Id, "host")
		wantCode(t, err, proto.CodeOrganizationDisabled)
		must(s.SetOrganizationDisabled(ctx, org, false, now))(t)
		if _, k, _, err := s.KeyByID(ctx, expired.Id); err != nil || k.Uses != 0 {
			t.Errorf("refused attempts took %d uses (%v)", k.GetUses(), err)
		}

		long := strings.Repeat("x", 63)
		for _, want := range []string{long, strings.Repeat("x", 56) + "-2"} {
			if a, _, err := join(s, org, expired.Id, long); err != nil || a.Name != want {
				t.Errorf("got %v, %v, want %s", a.GetName(), err, want)
			}
		}
	})
}

// TestRaceForLastUse: fifty hosts want one use, and ten want a name.
func TestRaceForLastUse(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		org, _ := tenants(t, s)
		k := newKey(t, s, org, 1)
		var won, usedUp atomic.Int32
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				_, _, err := join(s, org, k.Id, "host")
				switch {
				case err == nil:
					won.Add(1)
				case proto.CodeOf(err) == proto.CodeKeyUsedUp:
					usedUp.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 || usedUp.Load() != 49 {
			t.Errorf("%d joined, %d were told the key is used up", won.Load(), usedUp.Load())
		}
		if agents := must(s.ListAgents(ctx, org))(t); len(agents) != 1 {
			t.Errorf("%d agents", len(agents))
		}
		// Different keys, so the key's row does not serialize them.
		for range 10 {
			k := newKey(t, s, org, 1)
			wg.Go(func() {
				if _, _, err := join(s, org, k.Id, "host"); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		names := map[string]bool{}
		for _, a := range must(s.ListAgents(ctx, org))(t) {
			names[a.Name] = true
		}
		for n := 2; n <= 11; n++ {
			if !names[fmt.Sprintf("host-%d", n)] {
				t.Errorf("no host-%d among %v", n, names)
			}
		}
	})
}

func TestAgents(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		org, other := tenants(t, s)
		k := newKey(t, s, org, 10)
		a, _, err := join(s, org, k.Id, "host")
		if err != nil {
			t.Fatal(err)
		}
		hello := &posternv1.Agent{
			Id: a.Id, Software: "0.1", Hostname: "h", Os: "linux", Arch: "arm64", Kernel: "6.18", RemoteAddress: "192.0.2.1:5",
			Sources: []*posternv1.SourceInfo{{Name: "warehouse"}},
		}
		if err := s.SetAgentHello(ctx, org, hello, now); err != nil {
			t.Fatal(err)
		}
		wantCode(t, s.SetAgentHello(ctx, other, hello, now), proto.CodeNotFound)
		wantCode(t, s.SetAgentSources(ctx, other, a.Id, nil), proto.CodeNotFound)
		for i := range 25 {
			e := &posternv1.LinkEvent{Time: timestamppb.New(now), State: "up", Cause: fmt.Sprint(i)}
			if err := s.AppendLinkEvent(ctx, org, a.Id, e); err != nil {
				t.Fatal(err)
			}
		}
		wantCode(t, s.AppendLinkEvent(ctx, other, a.Id, &posternv1.LinkEvent{}), proto.CodeNotFound)
		got := must(s.GetAgent(ctx, org, "host"))(t)
		if got.Arch != "arm64" || len(got.Sources) != 1 || got.Sources[0].Name != "warehouse" || got.CertificateExpires == nil ||
			len(got.LinkEvents) != 20 || got.LinkEvents[0].Cause != "24" || got.LinkEvents[19].Cause != "5" {
			t.Errorf("got %v", got)
		}
		if err := s.TouchAgents(ctx, append(make([]string, 1200), a.Id), now.Add(time.Minute)); err != nil {
			t.Error(err)
		}
		if err := s.SetAgentSources(ctx, org, a.Id, nil); err != nil {
			t.Error(err)
		}
		got = must(s.FindAgent(ctx, org, a.Id))(t)
		if len(got.Sources) != 0 || !got.LastSeen.AsTime().Equal(now.Add(time.Minute).Truncate(time.Millisecond)) {
			t.Errorf("got %v", got)
		}
		for _, id := range []string{a.Id, "host"} {
			_, err := s.FindAgent(ctx, other, id)
			wantCode(t, err, proto.CodeNotFound)
			_, err = s.RevokeAgent(ctx, other, id, now)
			wantCode(t, err, proto.CodeNotFound)
		}
		if got := must(s.RevokeAgent(ctx, org, "host", now))(t); got.Revoked == nil {
			t.Error("not revoked")
		}
		_, err = s.FindAgent(ctx, org, "host")
		wantCode(t, err, proto.CodeNotFound)
		cut, _, err := s.CutSince(ctx, now.Add(-time.Second))
		if err != nil || len(cut) != 1 || cut[0] != a.Id {
			t.Errorf("CutSince: got %v, %v", cut, err)
		}
		if b, _, err := join(s, org, k.Id, "host"); err != nil || b.Name != "host" {
			t.Errorf("a revoked agent's name is not free: %v, %v", b.GetName(), err)
		}
		if live := must(s.ListAgents(ctx, org))(t); len(live) != 1 {
			t.Errorf("%d agents that are not revoked, want 1", len(live))
		}
	})
}

func TestCertificates(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		org, other := tenants(t, s)
		a, first, err := join(s, org, newKey(t, s, org, 1).Id, "host")
		if err != nil {
			t.Fatal(err)
		}
		state := func(serial, want string) {
			t.Helper()
			got, end, retired, err := s.IdentityState(ctx, org, a.Id, serial)
			if err != nil || got != want || !end.Equal(now.Add(24*time.Hour).Truncate(time.Millisecond)) || retired.IsZero() == (want == store.CertificateRetired) {
				t.Errorf("certificate %s: got %q, %v, %v, %v, want %q", serial, got, end, retired, err, want)
			}
		}
		confirm := func(serial string, want bool) {
			t.Helper()
			if got, err := s.ConfirmCertificate(ctx, a.Id, serial, now); err != nil || got != want {
				t.Errorf("confirm %s: got %v, %v, want %v", serial, got, err, want)
			}
		}
		issue := func(serial string) {
			t.Helper()
			if err := s.InsertCertificate(ctx, org, a.Id, serial, "ca", sha256.Sum256([]byte(serial)), now.Add(24*time.Hour), now, now.Add(-time.Hour)); err != nil {
				t.Fatal(err)
			}
		}
		state(first, store.CertificatePending)
		confirm(first, true)
		confirm(first, false)
		issue("second")
		issue("third")
		state(first, store.CertificateActive)
		state("second", store.CertificatePending)
		confirm("second", true)
		state(first, store.CertificateRetired)
		state("third", store.CertificatePending)
		confirm("third", true)
		confirm("second", false)
		state("second", store.CertificateRetired)
		for i := range 9 {
			issue(fmt.Sprint("unused", i))
		}
		state("unused0", store.CertificateRetired)
		state("unused1", store.CertificatePending)
		state("third", store.CertificateActive)

		_, _, _, err = s.IdentityState(ctx, other, a.Id, "third")
		wantCode(t, err, proto.CodeNotFound)
		_, _, _, err = s.IdentityState(ctx, org, a.Id, "nope")
		wantCode(t, err, proto.CodeNotFound)
		wantCode(t, s.InsertCertificate(ctx, other, a.Id, "x", "ca", [32]byte{}, now, now, now), proto.CodeNotFound)
		_, err = s.ConfirmCertificate(ctx, "agt_other", "third", now)
		wantCode(t, err, proto.CodeNotFound)

		must(s.SetOrganizationDisabled(ctx, org, true, now))(t)
		_, _, _, err = s.IdentityState(ctx, org, a.Id, "third")
		wantCode(t, err, proto.CodeOrganizationDisabled)
		must(s.SetOrganizationDisabled(ctx, org, false, now))(t)
		must(s.RevokeAgent(ctx, org, a.Id, now))(t)
		_, _, _, err = s.IdentityState(ctx, org, a.Id, "third")
		wantCode(t, err, proto.CodeAgentRevoked)
		wantCode(t, s.InsertCertificate(ctx, org, a.Id, "x", "ca", [32]byte{}, now, now, now), proto.CodeAgentRevoked)
	})
}

func TestAuthorities(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		der := certificate(t)
		if err := s.InsertAuthority(ctx, "f1", der, []byte("sealed"), "active", now); err != nil {
			t.Fatal(err)
		}
		wantCode(t, s.InsertAuthority(ctx, "f2", der, []byte("sealed"), "active", now), proto.CodeAlreadyExists)
		if err := s.InsertAuthority(ctx, "f3", der, []byte("sealed"), "trusted", now); err != nil {
			t.Fatal(err)
		}
		all := must(s.ListAuthorities(ctx))(t)
		if len(all) != 2 || all[0].State != "active" || all[0].Subject != "CN=test" || !strings.HasPrefix(all[0].Certificate, "-----BEGIN") {
			t.Errorf("got %v", all)
		}
		if key := must(s.SealedAuthorityKey(ctx, "f1"))(t); !bytes.Equal(key, []byte("sealed")) {
			t.Errorf("got %q", key)
		}
		_, err := s.SealedAuthorityKey(ctx, "f9")
		wantCode(t, err, proto.CodeNotFound)
	})
}

func TestAudit(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		org, other := tenants(t, s)
		var head auditchain.Head
		appendN := func(n int) auditchain.Head {
			t.Helper()
			prev, next := head, head
			var lines [][]byte
			for range n {
				e := auditchain.Entry{Time: now, Organization: org, Action: "test"}
				next = e.Seal(next)
				lines = append(lines, e.Encode())
			}
			if err := s.AppendAudit(ctx, org, prev, lines, next); err != nil {
				t.Fatal(err)
			}
			wantCode(t, s.AppendAudit(ctx, org, prev, lines, next), proto.CodeAlreadyExists)
			return next
		}
		head = appendN(1)
		head = appendN(250)
		if got := must(s.AuditHead(ctx, org))(t); got != head || got.Sequence != 251 {
			t.Errorf("head: got %v, want %v", got, head)
		}
		if got := must(s.AuditHead(ctx, other))(t); got != (auditchain.Head{}) {
			t.Errorf("head of an empty chain: got %v", got)
		}
		v := auditchain.NewVerifier(auditchain.Head{})
		for after := uint64(0); ; {
			lines, last, err := s.AuditAfter(ctx, org, after, 100)
			if err != nil {
				t.Fatal(err)
			}
			if len(lines) == 0 {
				break
			}
			for _, line := range lines {
				if err := v.Add(line); err != nil {
					t.Fatal(err)
				}
			}
			after = last
		}
		if v.Head() != head {
			t.Errorf("verified up to %v, want %v", v.Head(), head)
		}
		newest := must(s.AuditNewest(ctx, org, 2))(t)
		if len(newest) != 2 || must(auditchain.Decode(newest[0]))(t).Sequence != 251 {
			t.Errorf("newest: got %q", newest)
		}
		a, _, err := join(s, org, newKey(t, s, org, 1).Id, "host")
		if err != nil {
			t.Fatal(err)
		}
		for _, step := range []struct {
			sequence uint64
			want     bool
		}{{5, true}, {7, true}, {6, false}} {
			if got := must(s.SetAgentAuditHead(ctx, a.Id, auditchain.Head{Sequence: step.sequence}))(t); got != step.want {
				t.Errorf("head %d: got %v, want %v", step.sequence, got, step.want)
			}
		}
		if got := must(s.AgentAuditHead(ctx, a.Id))(t); got.Sequence != 7 {
			t.Errorf("agent's head: got %d, want 7", got.Sequence)
		}
	})
}
