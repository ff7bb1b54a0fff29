package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto"
)

// peer is a host with a certificate of ca's for this URI, valid until then.
func peer(t *testing.T, ca *authority, uri string, until time.Time, usage x509.ExtKeyUsage) *Identity {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	name, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	der := ca.sign(t, &key.PublicKey, func(c *x509.Certificate) {
		c.URIs, c.NotAfter, c.ExtKeyUsage = []*url.URL{name}, until, []x509.ExtKeyUsage{usage}
		c.NotBefore = until.Add(-time.Hour)
	})
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &Identity{now: time.Now, current: pair{key, cert}, authorities: []*x509.Certificate{ca.cert}}
}

func TestVerifyPeer(t *testing.T) {
	ca, soon := newAuthority(t), time.Now().Add(time.Hour)
	own := peer(t, ca, "postern://org_1/agent/agt_1", soon, x509.ExtKeyUsageClientAuth)
	statement := []byte("the move of a kernel")
	for _, test := range []struct {
		name  string
		other *Identity
		want  string // "" : it is believed
		code  proto.Code
	}{
		{"of the organization", peer(t, ca, "postern://org_1/agent/agt_2", soon, x509.ExtKeyUsageClientAuth), "", 0},
		{"of another one", peer(t, ca, "postern://org_2/agent/agt_2", soon, x509.ExtKeyUsageClientAuth), "not an agent's of this organization", proto.CodeInvalid},
		{"of another authority", peer(t, newAuthority(t), "postern://org_1/agent/agt_2", soon, x509.ExtKeyUsageClientAuth), "no authority that this host trusts", proto.CodeInvalid},
		{"a server", peer(t, ca, "postern://org_1/agent/agt_2", soon, x509.ExtKeyUsageServerAuth), "no authority that this host trusts", proto.CodeInvalid},
		{"no agent", peer(t, ca, "postern://org_1/user/agt_2", soon, x509.ExtKeyUsageClientAuth), "not an agent's", proto.CodeInvalid},
		{"expired", peer(t, ca, "postern://org_1/agent/agt_2", time.Now().Add(-time.Minute), x509.ExtKeyUsageClientAuth), "mend the clocks", proto.CodeClockSkew},
	} {
		t.Run(test.name, func(t *testing.T) {
			certificate, signature, err := test.other.Sign(statement)
			if err != nil {
				t.Fatal(err)
			}
			agent, err := own.VerifyPeer(certificate, signature, statement)
			switch {
			case test.want == "" && (err != nil || agent != "agt_2"):
				t.Errorf("got %q, %v", agent, err)
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want) || proto.CodeOf(err) != test.code):
				t.Errorf("got %q, %v, want %q", agent, err, test.want)
			}
		})
	}
	other := peer(t, ca, "postern://org_1/agent/agt_2", soon, x509.ExtKeyUsageClientAuth)
	certificate, signature, err := other.Sign(statement)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := own.VerifyPeer(certificate, signature, []byte("another statement")); err == nil {
		t.Error("a signature over another statement was believed")
	}
	sum := sha256.Sum256(statement)
	forged, err := ecdsa.SignASN1(rand.Reader, own.current.key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := own.VerifyPeer(certificate, forged, statement); err == nil {
		t.Error("another's signature was believed")
	}
	if _, err := own.VerifyPeer([]byte("no certificate"), signature, statement); err == nil {
		t.Error("what is no certificate was believed")
	}
}
