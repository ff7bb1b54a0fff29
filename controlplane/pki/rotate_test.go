package pki_test

import (
	"crypto/tls"
	"crypto/x509"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/postern-dev/postern/controlplane/pki"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
)

// shown is the authority of the certificate that the endpoint shows to a host that says these protocols.
func shown(t *testing.T, a *pki.Authority, protocols ...string) string {
	t.Helper()
	c, err := a.TLSConfig().GetCertificate(&tls.ClientHelloInfo{SupportedProtos: append([]string{"postern/1"}, protocols...)})
	if err != nil {
		t.Fatal(err)
	}
	ca, err := x509.ParseCertificate(c.Certificate[1])
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Leaf.CheckSignatureFrom(ca); err != nil {
		t.Fatalf("the chain: %v", err)
	}
	return pki.TrustName(ca.Raw)
}

// TestRotation takes two control planes on one store through a rotation, one of which is cut off
// between any two steps.
func TestRotation(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		file := filepath.Join(t.TempDir(), "master.key")
		c := &clock{at: time.Now()}
		open := func() *pki.Authority {
			a, err := pki.Open(ctx, pki.Config{Store: s, MasterKeyFile: file, Now: c.now})
			if err != nil {
				t.Fatal(err)
			}
			return a
		}
		reload := func(a *pki.Authority) {
			t.Helper()
			if err := a.Reload(ctx); err != nil {
				t.Fatal(err)
			}
		}
		a, b := open(), open()
		old := a.Certificates()[0]
		oldName := pki.TrustName(old)
		if r := a.Rotation(); r.Stage != pki.StageStable || r.Active == "" || r.Next+r.Old != "" {
			t.Fatalf("at first: %+v", r)
		}
		before, err := a.IssueAgent(request(t, newKey(t)), org, agent, c.now())
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Announce(ctx); err != nil {
			t.Fatal(err)
		}
		wantCode(t, b.Announce(ctx), proto.CodeAlreadyExists)
		r := b.Rotation()
		if r.Stage != pki.StageAnnounced || r.Next == "" || len(b.Certificates()) != 2 || !slices.Equal(b.Certificates()[0], old) {
			t.Fatalf("announced: %+v", r)
		}
		if cert, err := b.IssueAgent(request(t, newKey(t)), org, agent, c.now()); err != nil || !slices.Equal(cert.AuthorityKeyId, before.AuthorityKeyId) {
			t.Fatalf("announced, and it issues already: %v", err)
		}

		a = open() // after a kill -9
		if err := a.Activate(ctx, r.Next); err != nil {
			t.Fatal(err)
		}
		if err := a.Activate(ctx, r.Next); err != nil {
			t.Fatalf("a second time: %v", err)
		}
		after, err := a.IssueAgent(request(t, newKey(t)), org, agent, c.now())
		if err != nil || slices.Equal(after.AuthorityKeyId, before.AuthorityKeyId) {
			t.Fatalf("the new one does not issue: %v", err)
		}
		// The other control plane has not heard of it, and believes what the new one issued.
		if _, err := b.Verify(after, c.now()); err != nil {
			t.Fatalf("a control plane that is behind: %v", err)
		}
		reload(b)
		r = b.Rotation()
		newName := pki.TrustName(b.Certificates()[0])
		if r.Stage != pki.StageRenewing || r.Old == "" || newName == oldName {
			t.Fatalf("renewing: %+v", r)
		}
		if _, err := b.Verify(before, c.now()); err != nil {
			t.Fatalf("a certificate of the old one: %v", err)
		}
		for name, test := range map[string]struct {
			says []string
			want string
		}{
			"a version before":  {nil, oldName},
			"knows the old one": {[]string{oldName}, oldName},
			"knows both":        {[]string{oldName, newName}, newName},
			"knows the new one": {[]string{newName}, newName},
			"knows another":     {[]string{pki.TrustProtocol + "00"}, newName},
		} {
			if got := shown(t, b, test.says...); got != test.want {
				t.Errorf("%s: got the certificate of %s, want %s", name, got, test.want)
			}
		}
		wantCode(t, b.Announce(ctx), proto.CodeAlreadyExists)
		wantCode(t, b.Retire(ctx, r.Active), proto.CodeInvalid)
		if err := b.Retire(ctx, r.Old); err != nil {
			t.Fatal(err)
		}
		if err := b.Retire(ctx, r.Old); err != nil {
			t.Fatalf("a second time: %v", err)
		}
		wantCode(t, b.Activate(ctx, r.Old), proto.CodeNotFound)
		if sealed, err := s.SealedAuthorityKey(ctx, r.Old); err != nil || len(sealed) != 0 {
			t.Errorf("the old one's private key is still there: %d bytes, %v", len(sealed), err)
		}
		reload(a)
		if r := a.Rotation(); r.Stage != pki.StageStable || len(a.Certificates()) != 1 {
			t.Fatalf("at last: %+v", r)
		}
		if _, err := a.Verify(before, c.now()); proto.CodeOf(err) != proto.CodeUnauthenticated {
			t.Errorf("a certificate of the retired one: got %v", err)
		}
		if got := shown(t, a); got != newName {
			t.Errorf("the endpoint shows %s", got)
		}
		if err := a.Announce(ctx); err != nil { // the next rotation
			t.Fatal(err)
		}
	})
}
