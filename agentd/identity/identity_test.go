package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/atomicfile"
	"github.com/postern-dev/postern/proto"
)

// authority is a throwaway CA.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: "test CA"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{key, cert}
}

func (a *authority) ders() [][]byte { return [][]byte{a.cert.Raw} }

func (a *authority) issue(t *testing.T, csrDER []byte) []byte {
	t.Helper()
	csr, err := x509.ParseCertificateRequest(csrDER)
	if err != nil {
		t.Fatal(err)
	}
	if err := csr.CheckSignature(); err != nil {
		t.Fatal(err)
	}
	return a.sign(t, csr.PublicKey, func(c *x509.Certificate) {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	})
}

func (a *authority) sign(t *testing.T, pub any, change func(*x509.Certificate)) []byte {
	t.Helper()
	now := time.Now()
	template := &x509.Certificate{SerialNumber: big.NewInt(now.UnixNano()), NotBefore: now.Add(-5 * time.Minute), NotAfter: now.Add(time.Hour)}
	change(template)
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, pub, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

var testAgent = Agent{AgentID: "agt_1", Name: "host", Organization: "org_1", URL: "https://cp.example.com"}

func registered(t *testing.T, ca *authority) string {
	t.Helper()
	state := t.TempDir()
	e, err := Enrol(state, false)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := e.CSR()
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Finish(testAgent, ca.issue(t, csr), ca.ders()); err != nil {
		t.Fatal(err)
	}
	return state
}

func TestEnrolAndOpen(t *testing.T) {
	ca := newAuthority(t)
	if _, err := Open(t.TempDir()); !errors.Is(err, ErrNotRegistered) {
		t.Errorf("got %v", err)
	}
	state := registered(t, ca)
	i, err := Open(state)
	if err != nil {
		t.Fatal(err)
	}
	if i.Agent() != testAgent {
		t.Errorf("got %+v", i.Agent())
	}
	if _, err := Enrol(state, false); proto.CodeOf(err) != proto.CodeAlreadyExists || !strings.Contains(err.Error(), "--force") {
		t.Errorf("a second registration: %v", err)
	}
	entries, err := os.ReadDir(state)
	if err != nil || len(entries) != 1 {
		t.Errorf("left in the state directory: %v, %v", entries, err)
	}
	for _, name := range []string{keyFile, certFile, authoritiesFile, agentFile} {
		st, err := os.Stat(filepath.Join(Dir(state), name))
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, st.Mode(), err)
		}
	}
}

// TestEnrolForceIsAtomic fails each step of a forced registration.
func TestEnrolForceIsAtomic(t *testing.T) {
	ca := newAuthority(t)
	state := registered(t, ca)
	everyStep(t, func(files atomicfile.FS) error {
		e, err := enrol(state, true, files)
		if err != nil {
			return err
		}
		csr, err := e.CSR()
		if err != nil {
			return err
		}
		other := testAgent
		other.Name = "other"
		return e.Finish(other, ca.issue(t, csr), ca.ders())
	}, func() {
		if _, err := Open(state); err != nil {
			t.Fatal(err)
		}
	})
	i, err := Open(state)
	if err != nil || i.Agent().Name != "other" {
		t.Errorf("%v, %v", i, err)
	}
}

// everyStep runs do with the first step failing, then the second, until it
// passes; check runs after each.
func everyStep(t *testing.T, do func(atomicfile.FS) error, check func()) {
	t.Helper()
	boom := errors.New("crash")
	for n := range 100 {
		steps, last := 0, ""
		err := do(atomicfile.FS{Fault: func(op string) error {
			steps++
			last = op
			if steps > n {
				return boom
			}
			return nil
		}})
		check()
		if err == nil {
			if n < 5 {
				t.Fatalf("only %d steps", n)
			}
			return
		}
		if !errors.Is(err, boom) {
			t.Fatalf("step %d (%s): %v", n, last, err)
		}
	}
	t.Fatal("it never ended")
}

// TestRenewalSurvivesEveryCrash fails each step of a renewal in turn. The other
// side retires the old certificate when the new one is used, as the real one does.
func TestRenewalSurvivesEveryCrash(t *testing.T) {
	ca := newAuthority(t)
	state := registered(t, ca)
	valid := map[string]bool{}
	use := func(i *Identity) (next bool) {
		t.Helper()
		config, _, next := i.Credential()
		serial := config.Certificates[0].Leaf.SerialNumber.String()
		if len(valid) > 0 && !valid[serial] {
			t.Fatalf("the certificate in use was never issued or is retired")
		}
		valid = map[string]bool{serial: true}
		return next
	}
	first, err := Open(state)
	if err != nil {
		t.Fatal(err)
	}
	use(first)
	everyStep(t, func(files atomicfile.FS) error {
		i, err := open(state, files)
		if err != nil {
			return err
		}
		if use(i) {
			if err := i.Promote(); err != nil {
				return err
			}
		}
		csr, err := i.Request()
		if err != nil {
			return err
		}
		der := ca.issue(t, csr)
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		valid[cert.SerialNumber.String()] = true
		if err := i.Accept(der, ca.ders()); err != nil {
			return err
		}
		if !use(i) {
			t.Fatal("the next pair is not offered")
		}
		return i.Promote()
	}, func() {
		i, err := Open(state)
		if err != nil {
			t.Fatal(err)
		}
		use(i)
	})
	i, err := Open(state)
	if err != nil {
		t.Fatal(err)
	}
	if use(i) {
		t.Error("a next pair is left")
	}
	for _, name := range []string{nextKeyFile, nextCertFile} {
		if _, err := os.Stat(filepath.Join(Dir(state), name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
}

// TestPromoteAgain: a promotion that failed half-way in a running daemon is
// finished by the next attempt, or by the next renewal.
func TestPromoteAgain(t *testing.T) {
	ca := newAuthority(t)
	for _, again := range []string{"promote", "request", "discard"} {
		t.Run(again, func(t *testing.T) {
			state := registered(t, ca)
			i, err := Open(state)
			if err != nil {
				t.Fatal(err)
			}
			csr, err := i.Request()
			if err != nil {
				t.Fatal(err)
			}
			if err := i.Accept(ca.issue(t, csr), ca.ders()); err != nil {
				t.Fatal(err)
			}
			i.fs.Fault = func(op string) error {
				if op == "rename "+certFile {
					return errors.New("no")
				}
				return nil
			}
			if err := i.Promote(); err == nil {
				t.Fatal("it passed")
			}
			i.fs.Fault = nil
			switch again {
			case "promote":
				err = i.Promote()
			case "request":
				_, err = i.Request()
			case "discard":
				err = i.Discard()
			}
			if err != nil {
				t.Fatal(err)
			}
			serial := i.Serial()
			reopened, err := Open(state)
			if err != nil {
				t.Fatal(err)
			}
			if reopened.Serial() != serial {
				t.Error("the pair on disk is another")
			}
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	ca := newAuthority(t)
	for _, tt := range []struct {
		name  string
		spoil func(dir string) error
		want  string
	}{
		{"key readable", func(d string) error { return os.Chmod(filepath.Join(d, keyFile), 0o640) }, "chmod 0600"},
		{"directory writable", func(d string) error { return os.Chmod(d, 0o770) }, "chmod 0700"},
		{"key garbled", func(d string) error { return os.WriteFile(filepath.Join(d, keyFile), []byte("x"), 0o600) }, "damaged"},
		{"agent garbled", func(d string) error { return os.WriteFile(filepath.Join(d, agentFile), []byte("{"), 0o600) }, "damaged"},
		{"no agent", func(d string) error { return os.Remove(filepath.Join(d, agentFile)) }, "incomplete"},
		{"authorities garbled", func(d string) error {
			return os.WriteFile(filepath.Join(d, authoritiesFile), []byte("-----BEGIN CERTIFICATE-----\nzz\n-----END CERTIFICATE-----\n"), 0o600)
		}, "malformed"},
		{"foreign certificate", func(d string) error {
			key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader) //nolint:errcheck // never fails
			csr, err := newCSR(key)
			if err != nil {
				return err
			}
			cert, err := x509.ParseCertificate(ca.issue(t, csr))
			if err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(d, certFile), encodeCertificates(cert), 0o600)
		}, "do not belong together"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			state := registered(t, ca)
			if err := tt.spoil(Dir(state)); err != nil {
				t.Fatal(err)
			}
			_, err := Open(state)
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestAcceptRefuses(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	i, err := Open(registered(t, ca))
	if err != nil {
		t.Fatal(err)
	}
	csr, err := i.Request()
	if err != nil {
		t.Fatal(err)
	}
	stranger, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader) //nolint:errcheck // never fails
	for name, try := range map[string]func() error{
		"garbage":         func() error { return i.Accept([]byte("x"), ca.ders()) },
		"another key":     func() error { return i.Accept(ca.sign(t, &stranger.PublicKey, func(*x509.Certificate) {}), ca.ders()) },
		"other authority": func() error { return i.Accept(other.issue(t, csr), ca.ders()) },
		"no authority":    func() error { return i.Accept(ca.issue(t, csr), nil) },
		"bad authority":   func() error { return i.Accept(ca.issue(t, csr), [][]byte{ca.issue(t, csr)}) },
	} {
		if err := try(); proto.CodeOf(err) != proto.CodeInvalid {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, _, next := i.Credential(); next {
		t.Error("something was accepted")
	}
	if err := i.Accept(ca.issue(t, csr), append(other.ders(), ca.cert.Raw)); err != nil {
		t.Error(err)
	}
}

// TestServerVerification runs real handshakes against good and bad servers.
func TestServerVerification(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	i, err := Open(registered(t, ca))
	if err != nil {
		t.Fatal(err)
	}
	serverKey, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader) //nolint:errcheck // never fails
	good := func(c *x509.Certificate) {
		c.DNSNames = []string{ServerName}
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	leaf := func(a *authority, change func(*x509.Certificate)) [][]byte {
		return [][]byte{a.sign(t, &serverKey.PublicKey, func(c *x509.Certificate) { good(c); change(c) }), a.cert.Raw}
	}
	nothing := func(*x509.Certificate) {}
	for _, tt := range []struct {
		name  string
		chain [][]byte
		now   time.Duration
		want  proto.Code
	}{
		{"good", leaf(ca, nothing), 0, 0},
		{"other authority", leaf(other, nothing), 0, proto.CodeWrongControlPlane},
		{"our CA beside a foreign leaf", [][]byte{leaf(other, nothing)[0], ca.cert.Raw}, 0, proto.CodeWrongControlPlane},
		{"wrong name", leaf(ca, func(c *x509.Certificate) { c.DNSNames = []string{"cp.example.com"} }), 0, proto.CodeWrongControlPlane},
		{"an agent's certificate", leaf(ca, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), 0, proto.CodeWrongControlPlane},
		{"clock behind", leaf(ca, nothing), -30 * time.Minute, proto.CodeClockSkew},
		{"clock ahead", leaf(ca, nothing), 3 * time.Hour, proto.CodeClockSkew},
	} {
		now := func() time.Time { return time.Now().Add(tt.now) }
		i.now = now
		withIdentity, _, _ := i.Credential()
		for way, config := range map[string]*tls.Config{"identity": withIdentity, "pinned": pinnedTLS(sha256.Sum256(ca.cert.Raw), now)} {
			t.Run(tt.name+"/"+way, func(t *testing.T) {
				err := handshake(t, config, tls.Certificate{Certificate: tt.chain, PrivateKey: serverKey})
				if got := proto.CodeOf(err); got != tt.want {
					t.Errorf("got %v (%v), want %v", got, err, tt.want)
				}
			})
		}
	}
	t.Run("pinned/CA not presented", func(t *testing.T) {
		err := handshake(t, PinnedTLS(sha256.Sum256(ca.cert.Raw)), tls.Certificate{Certificate: leaf(ca, nothing)[:1], PrivateKey: serverKey})
		if proto.CodeOf(err) != proto.CodeWrongControlPlane {
			t.Errorf("got %v", err)
		}
	})
}

func handshake(t *testing.T, client *tls.Config, server tls.Certificate) error {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // loopback
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()                            //nolint:errcheck // loopback
		conn.SetDeadline(time.Now().Add(time.Minute)) //nolint:errcheck // loopback
		s := tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{server}, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true})
		s.Handshake() //nolint:errcheck // the client's word counts
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(time.Minute)) //nolint:errcheck // loopback
	err = tls.Client(conn, client).Handshake()
	conn.Close() //nolint:errcheck // loopback
	<-done
	return err
}

func TestParseBundle(t *testing.T) {
	ca := newAuthority(t)
	good := string(encodeCertificates(ca.cert))
	for _, tt := range []struct {
		name, text string
		n          int
	}{
		{"one", good, 1},
		{"two with comments", "# mine\n" + good + "# other\n" + good, 2},
		{"empty", "", 0},
		{"cut", good[:len(good)/2], 0},
		{"good then cut", good + good[:len(good)/2], 0},
		{"bad between", good + strings.Replace(good, "M", "*", 3) + good, 0},
		{"a key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			certs, err := ParseBundle([]byte(tt.text))
			if len(certs) != tt.n || (err == nil) != (tt.n > 0) {
				t.Errorf("got %d, %v", len(certs), err)
			}
		})
	}
}

func FuzzParseBundle(f *testing.F) {
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		certs, err := ParseBundle(raw)
		if (err == nil) != (len(certs) > 0) {
			t.Fatal(fmt.Sprint(certs), err)
		}
	})
}
