package pki_test

import (
	"crypto/x509"
	"net/url"
	"testing"

	"github.com/postern-dev/postern/controlplane/pki"
)

// FuzzIdentityURI: what is taken for an identity is one to the letter.
func FuzzIdentityURI(f *testing.F) {
	for _, seed := range []string{
		"postern://" + org + "/agent/" + agent, "POSTERN://" + org + "/agent/" + agent, "postern://org_a/agent/agt_b?c", "postern://org_a:1/agent/agt_b",
		"postern://org_a/agent/agt_b\n", "postern://org_%61/agent/agt_b", "postern:org_a", "",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		o, a, err := pki.ParseIdentityURI(text)
		if err == nil && pki.IdentityURI(o, a) != text {
			t.Errorf("%q is taken for %q, %q", text, o, a)
		}
		u, uerr := url.Parse(text)
		if uerr != nil {
			return
		}
		if o, a, err := pki.ParseIdentityURI(u.String()); err == nil && (u.Host != o || u.Path != "/agent/"+a || u.User != nil) {
			t.Errorf("%q is taken for %q, %q", text, o, a)
		}
	})
}

// FuzzParseIdentity: no certificate makes it panic.
func FuzzParseIdentity(f *testing.F) {
	f.Add([]byte{0x30, 0x03, 0x02, 0x01, 0x00})
	f.Fuzz(func(t *testing.T, der []byte) {
		certificate, err := x509.ParseCertificate(der)
		if err != nil {
			return
		}
		if id, err := pki.ParseIdentity(certificate); err == nil && (id.Organization == "" || id.Agent == "" || id.Serial == "") {
			t.Errorf("an identity with holes: %+v", id)
		}
	})
}
