package pki_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/controlplane/pki"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
)

var ctx = context.Background()

const (
	org   = "org_01aryz6s41tsv4rrffq69g5fav"
	agent = "agt_01aryz6s41tsv4rrffq69g5fav"
)

func wantCode(t *testing.T, err error, want proto.Code) {
	t.Helper()
	if proto.CodeOf(err) != want {
		t.Fatalf("got error %v (%v), want %v", err, proto.CodeOf(err), want)
	}
}

// clock is a settable clock.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

func newAuthority(t *testing.T) (*pki.Authority, *clock) {
	t.Helper()
	c := &clock{at: time.Now()}
	a, err := pki.Open(ctx, pki.Config{Store: storetest.SQLite(t), MasterKeyFile: filepath.Join(t.TempDir(), "master.key"), Now: c.now})
	if err != nil {
		t.Fatal(err)
	}
	return a, c
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func request(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "root"}, DNSNames: []string{pki.ServerName},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func TestIssueAgent(t *testing.T) {
	a, c := newAuthority(t)
	key := newKey(t)
	cert, err := a.IssueAgent(request(t, key), org, agent, c.now())
	if err != nil {
		t.Fatal(err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) || len(cert.DNSNames) != 0 || cert.Subject.CommonName != agent ||
		cert.IsCA || !cert.BasicConstraintsValid || cert.URIs[0].String() != "postern://"+org+"/agent/"+agent {
		t.Errorf("got %+v", cert)
	}
	if life, back := cert.NotAfter.Sub(c.now()), c.now().Sub(cert.NotBefore); life > 24*time.Hour || life < 24*time.Hour-2*time.Second || back < 5*time.Minute || back > 5*time.Minute+2*time.Second {
		t.Errorf("lives %s, backdated %s", life, back)
	}
	id, err := a.Verify(cert, c.now())
	if err != nil || id != (pki.Identity{Organization: org, Agent: agent, Serial: pki.SerialText(cert.SerialNumber)}) {
		t.Errorf("got %+v, %v", id, err)
	}
	if again, err := a.IssueAgent(request(t, key), org, agent, c.now()); err != nil || again.SerialNumber.Cmp(cert.SerialNumber) == 0 || len(pki.SerialText(cert.SerialNumber)) != 32 {
		t.Errorf("serials %s and %s, %v", cert.SerialNumber, again.SerialNumber, err)
	}
}

func TestIssueAgentRefusesBadRequests(t *testing.T) {
	a, c := newAuthority(t)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	forged := request(t, newKey(t))
	forged[len(forged)-1] ^= 1
	for name, csr := range map[string][]byte{
		"empty": nil, "garbage": []byte("garbage"), "long": make([]byte, 9000),
		"P-384": request(t, p384), "Ed25519": request(t, ed), "forged": forged,
	} {
		t.Run(name, func(t *testing.T) {
			_, err := a.IssueAgent(csr, org, agent, c.now())
			wantCode(t, err, proto.CodeInvalid)
		})
	}
	for _, ids := range [][2]string{{"org_a/../b", agent}, {org, "agt_a?b"}, {"", ""}, {org, "tok_1"}} {
		if _, err := a.IssueAgent(request(t, newKey(t)), ids[0], ids[1], c.now()); err == nil {
			t.Errorf("issued for %v", ids)
		}
	}
}

// TestVerifyRefuses: what our own key signed is refused too, unless it is an
// agent's certificate to the letter.
func TestVerifyRefuses(t *testing.T) {
	a, c := newAuthority(t)
	other, _ := newAuthority(t)
	uri := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	good := func() *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(7), NotBefore: c.now().Add(-time.Minute), NotAfter: c.now().Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
			BasicConstraintsValid: true, URIs: []*url.URL{uri("postern://" + org + "/agent/" + agent)},
		}
	}
	for _, test := range []struct {
		name   string
		change func(*x509.Certificate)
		want   proto.Code
	}{
		{"good", func(*x509.Certificate) {}, 0},
		{"two URIs", func(x *x509.Certificate) { x.URIs = append(x.URIs, x.URIs[0]) }, proto.CodeUnauthenticated},
		{"no URI", func(x *x509.Certificate) { x.URIs = nil }, proto.CodeUnauthenticated},
		{"a DNS name too", func(x *x509.Certificate) { x.DNSNames = []string{"a"} }, proto.CodeUnauthenticated},
		{"an address too", func(x *x509.Certificate) { x.IPAddresses = []net.IP{net.IPv4(1, 2, 3, 4)} }, proto.CodeUnauthenticated},
		{"an e-mail address too", func(x *x509.Certificate) { x.EmailAddresses = []string{"a@b"} }, proto.CodeUnauthenticated},
		{"another scheme", func(x *x509.Certificate) { x.URIs[0] = uri("https://" + org + "/agent/" + agent) }, proto.CodeUnauthenticated},
		{"a query", func(x *x509.Certificate) { x.URIs[0] = uri("postern://" + org + "/agent/" + agent + "?a=b") }, proto.CodeUnauthenticated},
		{"a fragment", func(x *x509.Certificate) { x.URIs[0] = uri("postern://" + org + "/agent/" + agent + "#a") }, proto.CodeUnauthenticated},
		{"a user", func(x *x509.Certificate) { x.URIs[0] = uri("postern://u@" + org + "/agent/" + agent) }, proto.CodeUnauthenticated},
		{"a port", func(x *x509.Certificate) { x.URIs[0] = uri("postern://" + org + ":1/agent/" + agent) }, proto.CodeUnauthenticated},
		{"an escaped path", func(x *x509.Certificate) { x.URIs[0] = uri("postern://" + org + "/agent/%61gt_1") }, proto.CodeUnauthenticated},
		{"a longer path", func(x *x509.Certificate) { x.URIs[0] = uri("postern://" + org + "/agent/" + agent + "/x") }, proto.CodeUnauthenticated},
		{"another kind", func(x *x509.Certificate) { x.URIs[0] = uri("postern://" + org + "/user/" + agent) }, proto.CodeUnauthenticated},
		{"for servers", func(x *x509.Certificate) { x.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, proto.CodeUnauthenticated},
		{"for servers too", func(x *x509.Certificate) { x.ExtKeyUsage = append(x.ExtKeyUsage, x509.ExtKeyUsageServerAuth) }, proto.CodeUnauthenticated},
		{"for nothing in particular", func(x *x509.Certificate) { x.ExtKeyUsage = nil }, proto.CodeUnauthenticated},
		{"for anything", func(x *x509.Certificate) { x.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }, proto.CodeUnauthenticated},
		{"an authority", func(x *x509.Certificate) { x.IsCA = true }, proto.CodeUnauthenticated},
		{"not valid yet", func(x *x509.Certificate) { x.NotBefore = c.now().Add(time.Minute) }, proto.CodeUnauthenticated},
	} {
		t.Run(test.name, func(t *testing.T) {
			template := good()
			test.change(template)
			cert, err := a.Sign(template, &newKey(t).PublicKey)
			if err != nil {
				t.Fatal(err)
			}
			if id, err := a.Verify(cert, c.now()); proto.CodeOf(err) != test.want || (err != nil && id != pki.Identity{}) {
				t.Errorf("got %+v, %v, want %v", id, err, test.want)
			}
			_, err = other.Verify(cert, c.now())
			wantCode(t, err, proto.CodeUnauthenticated)
		})
	}
	t.Run("another authority of the same name", func(t *testing.T) {
		key := newKey(t)
		fake, err := x509.ParseCertificate(a.Certificates()[0])
		if err != nil {
			t.Fatal(err)
		}
		fake.PublicKey = &key.PublicKey // its name and key id are the true one's
		der, err := x509.CreateCertificate(rand.Reader, good(), fake, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		_, err = a.Verify(cert, c.now())
		wantCode(t, err, proto.CodeUnauthenticated)
	})
	t.Run("ended within the grace period", func(t *testing.T) {
		cert, err := a.IssueAgent(request(t, newKey(t)), org, agent, c.now())
		if err != nil {
			t.Fatal(err)
		}
		if id, err := a.Verify(cert, cert.NotAfter.Add(29*24*time.Hour)); err != nil || !id.Expired || id.Agent != agent {
			t.Errorf("got %+v, %v", id, err)
		}
		if id, err := a.Verify(cert, cert.NotAfter); err != nil || id.Expired {
			t.Errorf("at its end: got %+v, %v", id, err)
		}
	})
}

// handshake runs the inner handshake over a pipe and returns both sides' errors,
// what the server saw and what the client saw.
func handshake(t *testing.T, a *pki.Authority, client *tls.Config) (server, peer tls.ConnectionState, serverErr, clientErr error) {
	t.Helper()
	left, right := net.Pipe()
	s, c := tls.Server(left, a.TLSConfig()), tls.Client(right, client)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if serverErr = s.Handshake(); serverErr == nil {
			_, serverErr = s.Write([]byte("x"))
		}
		if serverErr != nil {
			_ = left.Close()
		}
	}()
	// In TLS 1.3 the client learns from its first read that it was refused.
	if clientErr = c.Handshake(); clientErr == nil {
		_, clientErr = io.ReadFull(c, make([]byte, 1))
	}
	if clientErr != nil {
		_ = right.Close()
	}
	<-done
	server, peer = s.ConnectionState(), c.ConnectionState()
	_, _ = left.Close(), right.Close()
	return server, peer, serverErr, clientErr
}

func clientConfig(t *testing.T, a *pki.Authority, c *clock) *tls.Config {
	t.Helper()
	pool := x509.NewCertPool()
	for _, der := range a.Certificates() {
		ca, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		pool.AddCert(ca)
	}
	return &tls.Config{RootCAs: pool, ServerName: pki.ServerName, Time: c.now}
}

func TestHandshake(t *testing.T) {
	a, c := newAuthority(t)
	other, _ := newAuthority(t)
	key := newKey(t)
	issue := func(by *pki.Authority) tls.Certificate {
		cert, err := by.IssueAgent(request(t, key), org, agent, c.now())
		if err != nil {
			t.Fatal(err)
		}
		return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
	}
	t.Run("no certificate", func(t *testing.T) {
		state, peer, serr, cerr := handshake(t, a, clientConfig(t, a, c))
		if serr != nil || cerr != nil {
			t.Fatal(serr, cerr)
		}
		if id, err := a.Identify(state); err != nil || id != (pki.Identity{}) {
			t.Errorf("got %+v, %v", id, err)
		}
		// The pin in a registration key finds the authority in what the server sent.
		last := peer.PeerCertificates[len(peer.PeerCertificates)-1]
		if sha256.Sum256(last.Raw) != a.Fingerprint() || peer.Version != tls.VersionTLS13 {
			t.Error("the chain does not end in the authority")
		}
	})
	t.Run("good", func(t *testing.T) {
		cfg := clientConfig(t, a, c)
		cfg.Certificates = []tls.Certificate{issue(a)}
		state, _, serr, cerr := handshake(t, a, cfg)
		if serr != nil || cerr != nil {
			t.Fatal(serr, cerr)
		}
		if id, err := a.Identify(state); err != nil || id.Agent != agent || id.Organization != org {
			t.Errorf("got %+v, %v", id, err)
		}
	})
	t.Run("another control plane's", func(t *testing.T) {
		cfg := clientConfig(t, a, c)
		cfg.Certificates = []tls.Certificate{issue(other)}
		if _, _, serr, cerr := handshake(t, a, cfg); serr == nil || cerr == nil {
			t.Error("the handshake succeeded")
		}
	})
	t.Run("a chain with an authority of one's own", func(t *testing.T) {
		cfg := clientConfig(t, a, c)
		fake := issue(other)
		fake.Certificate = append(fake.Certificate, other.Certificates()[0], a.Certificates()[0])
		cfg.Certificates = []tls.Certificate{fake}
		if _, _, serr, _ := handshake(t, a, cfg); serr == nil {
			t.Error("the handshake succeeded")
		}
	})
	t.Run("somebody else's certificate", func(t *testing.T) {
		cfg := clientConfig(t, a, c)
		stolen := issue(a)
		stolen.PrivateKey = newKey(t)
		cfg.Certificates = []tls.Certificate{stolen}
		if _, _, serr, _ := handshake(t, a, cfg); serr == nil {
			t.Error("the handshake succeeded without the key")
		}
	})
	t.Run("TLS 1.2", func(t *testing.T) {
		cfg := clientConfig(t, a, c)
		cfg.MaxVersion = tls.VersionTLS12
		if _, _, serr, _ := handshake(t, a, cfg); serr == nil {
			t.Error("the handshake succeeded")
		}
	})
	t.Run("ended", func(t *testing.T) {
		cert := issue(a)
		for _, step := range []struct {
			wait time.Duration
			want proto.Code
		}{{25 * time.Hour, 0}, {40 * 24 * time.Hour, proto.CodeIdentityExpired}} {
			c.advance(step.wait)
			cfg := clientConfig(t, a, c)
			cfg.Certificates = []tls.Certificate{cert}
			state, _, serr, cerr := handshake(t, a, cfg)
			if serr != nil || cerr != nil {
				t.Fatal(serr, cerr) // the server's own certificate is a fresh one
			}
			id, err := a.Identify(state)
			wantCode(t, err, step.want)
			if id.Expired != (err == nil) {
				t.Errorf("got %+v", id)
			}
		}
	})
}

func TestServerCertificateIsRenewed(t *testing.T) {
	a, c := newAuthority(t)
	serial := func() string {
		cert, err := a.TLSConfig().GetCertificate(nil)
		if err != nil {
			t.Fatal(err)
		}
		return cert.Leaf.SerialNumber.String()
	}
	first := serial()
	c.advance(15 * time.Hour)
	if serial() != first {
		t.Error("renewed before two thirds of its life")
	}
	c.advance(2 * time.Hour)
	if serial() == first {
		t.Error("not renewed after two thirds of its life")
	}
}

func TestReopen(t *testing.T) {
	dir := t.TempDir()
	db := filepath.Join(dir, "postern.db")
	s := storetest.Open(t, store.Config{SQLitePath: db})
	cfg := pki.Config{Store: s, MasterKeyFile: filepath.Join(dir, "master.key")}
	a, err := pki.Open(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	// A copy that a first start left behind which was killed as it made the file.
	left := filepath.Join(dir, ".master.key.123456789")
	if err := os.Link(cfg.MasterKeyFile, left); err != nil {
		t.Fatal(err)
	}
	b, err := pki.Open(ctx, cfg)
	if err != nil || b.Fingerprint() != a.Fingerprint() {
		t.Fatalf("opened again: %v", err)
	}
	if _, err := os.Stat(left); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the copy of the master key stays: %v", err)
	}
	master, err := os.ReadFile(cfg.MasterKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(cfg.MasterKeyFile); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	check := func(name, want string, change func() error) {
		t.Run(name, func(t *testing.T) {
			if err := change(); err != nil {
				t.Fatal(err)
			}
			_, err := pki.Open(ctx, cfg)
			if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %q", err, want)
			}
			if err := os.RemoveAll(cfg.MasterKeyFile); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(cfg.MasterKeyFile, master, 0o600); err != nil {
				t.Fatal(err)
			}
		})
	}
	check("another master key", "does not open", func() error { return os.WriteFile(cfg.MasterKeyFile, make([]byte, 32), 0o600) })
	check("a short master key", "does not hold 32 bytes", func() error { return os.WriteFile(cfg.MasterKeyFile, master[:31], 0o600) })
	check("a master key that others can read", "chmod 600", func() error { return os.Chmod(cfg.MasterKeyFile, 0o604) })
	check("no master key", "is missing", func() error { return os.Remove(cfg.MasterKeyFile) })

	// Neither the CA's private key nor the master key is in the database.
	if storetest.Contains(t, db, master) {
		t.Error("the database holds the master key")
	}
	for _, der := range pki.PrivateKeys(a) {
		if storetest.Contains(t, db, der) {
			t.Error("the database holds the CA's private key in the clear")
		}
	}
}

// TestStartTogether: several control planes on one store make one CA.
func TestStartTogether(t *testing.T) {
	s := storetest.SQLite(t)
	file := filepath.Join(t.TempDir(), "master.key")
	var wg sync.WaitGroup
	prints := make([][32]byte, 8)
	for i := range prints {
		wg.Go(func() {
			a, err := pki.Open(ctx, pki.Config{Store: s, MasterKeyFile: file})
			if err != nil {
				t.Error(err)
				return
			}
			prints[i] = a.Fingerprint()
		})
	}
	wg.Wait()
	for _, p := range prints {
		if !bytes.Equal(p[:], prints[0][:]) {
			t.Error("several CAs were made")
		}
	}
}

// TestTwoAuthorities: what a trusted authority issued stays good while another is
// active.
func TestTwoAuthorities(t *testing.T) {
	c := &clock{at: time.Now()}
	old, both := storetest.SQLite(t), storetest.SQLite(t)
	dir := t.TempDir()
	a, err := pki.Open(ctx, pki.Config{Store: old, MasterKeyFile: filepath.Join(dir, "master.key"), Now: c.now})
	if err != nil {
		t.Fatal(err)
	}
	b, err := pki.Open(ctx, pki.Config{Store: both, MasterKeyFile: filepath.Join(dir, "master.key"), Now: c.now})
	if err != nil {
		t.Fatal(err)
	}
	before, err := a.IssueAgent(request(t, newKey(t)), org, agent, c.now())
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.Verify(before, c.now())
	wantCode(t, err, proto.CodeUnauthenticated)
	known, err := old.ListAuthorities(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := both.InsertAuthority(ctx, known[0].Fingerprint, a.Certificates()[0], []byte("unused"), pki.StateTrusted, c.now()); err != nil {
		t.Fatal(err)
	}
	if err := b.Reload(ctx); err != nil {
		t.Fatal(err)
	}
	if id, err := b.Verify(before, c.now()); err != nil || id.Agent != agent {
		t.Errorf("after the reload: got %+v, %v", id, err)
	}
	if len(b.Certificates()) != 2 || b.Fingerprint() == a.Fingerprint() {
		t.Error("the active authority is not first, or the trusted one is missing")
	}
}

// TestBox: a box opens what it sealed, about the same thing, and nothing else does.
func TestBox(t *testing.T) {
	a, _ := newAuthority(t)
	one, again, another := a.Box("one"), a.Box("one"), a.Box("two")
	sealed, err := one.Seal([]byte("plain text"), "x")
	if err != nil || bytes.Contains(sealed, []byte("plain")) {
		t.Fatalf("got %q, %v", sealed, err)
	}
	if got, err := again.Open(sealed, "x"); err != nil || string(got) != "plain text" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := one.Open(sealed, "y"); err == nil {
		t.Error("opened about another thing")
	}
	if _, err := another.Open(sealed, "x"); err == nil {
		t.Error("opened for another purpose")
	}
	sealed[len(sealed)-1]++
	if _, err := one.Open(sealed, "x"); err == nil {
		t.Error("opened although altered")
	}
	if text := fmt.Sprintf("%v %+v %#v", one, one, one); text != "redacted redacted redacted" {
		t.Errorf("a box prints as %s", text)
	}
}

// shownKey is the public key that a peer shows.
func shownKey(t *testing.T, config *tls.Config) []byte {
	t.Helper()
	one, err := config.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	return one.Leaf.RawSubjectPublicKeyInfo
}

// TestPeerTLS wants the same key from the same master key, and another one from another.
func TestPeerTLS(t *testing.T) {
	store := storetest.SQLite(t)
	file := filepath.Join(t.TempDir(), "master.key")
	var keys [][]byte
	for range 2 {
		a, err := pki.Open(ctx, pki.Config{Store: store, MasterKeyFile: file})
		if err != nil {
			t.Fatal(err)
		}
		config, err := a.PeerTLS()
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, shownKey(t, config))
	}
	other, _ := newAuthority(t)
	config, err := other.PeerTLS()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(keys[0], keys[1]) || bytes.Equal(keys[0], shownKey(t, config)) {
		t.Error("the key does not follow from the master key")
	}
	if err := config.VerifyConnection(tls.ConnectionState{}); err == nil {
		t.Error("a peer without a certificate is accepted")
	}
}
