package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/postern-dev/postern/agentd/atomicfile"
	"github.com/postern-dev/postern/proto"
)

// ErrNotRegistered is returned by Open when the state directory holds no
// identity.
var ErrNotRegistered = errors.New("this host is not registered")

const (
	dirName         = "identity"
	keyFile         = "key.pem"
	certFile        = "cert.pem"
	nextKeyFile     = "next-key.pem"
	nextCertFile    = "next-cert.pem"
	authoritiesFile = "authorities.pem"
	agentFile       = "agent.json"
)

// Agent says which agent this host is and of which control plane.
type Agent struct {
	AgentID      string `json:"agent_id"`
	Name         string `json:"name"`
	Organization string `json:"organization"`
	// URL is the control plane's, as registered.
	URL string `json:"url"`
}

// pair is a key and the certificate for it.
type pair struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

// Identity is the identity of one host.
type Identity struct {
	dir string
	fs  atomicfile.FS
	now func() time.Time

	mu          sync.Mutex
	agent       Agent
	current     pair
	next        *pair             // complete, not yet proved by use
	keyMoved    bool              // a promotion stopped between its two renames
	pendingKey  *ecdsa.PrivateKey // asked for, no certificate yet
	authorities []*x509.Certificate
}

// Dir is where the identity of the agent with this state directory is kept.
func Dir(stateDir string) string { return filepath.Join(stateDir, dirName) }

// Open loads the identity below stateDir and finishes a promotion that a crash
// interrupted. ErrNotRegistered says that there is none.
func Open(stateDir string) (*Identity, error) {
	return open(stateDir, atomicfile.FS{})
}

func open(stateDir string, files atomicfile.FS) (*Identity, error) {
	i := &Identity{dir: Dir(stateDir), fs: files, now: time.Now}
	st, err := os.Stat(i.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, ErrNotRegistered
	case err != nil:
		return nil, err
	case st.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("identity directory %s can be written by others (mode %04o): run chmod 0700 %s", i.dir, st.Mode().Perm(), i.dir)
	}
	if err := i.load(); err != nil {
		return nil, err
	}
	return i, nil
}

func (i *Identity) load() error {
	raw, err := os.ReadFile(i.path(agentFile))
	if err != nil {
		return fmt.Errorf("identity is incomplete: %w: register again with --force", err)
	}
	if err := json.Unmarshal(raw, &i.agent); err != nil || i.agent.AgentID == "" {
		return fmt.Errorf("identity file %s is damaged: register again with --force", i.path(agentFile))
	}
	if i.authorities, err = readCertificates(i.path(authoritiesFile)); err != nil {
		return err
	}
	key, err := readKey(i.path(keyFile))
	if err != nil {
		return err
	}
	certs, err := readCertificates(i.path(certFile))
	if err != nil {
		return err
	}
	nextKey, err := readKey(i.path(nextKeyFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var nextCert *x509.Certificate
	nextCerts, err := readCertificates(i.path(nextCertFile))
	if err == nil {
		nextCert = nextCerts[0]
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	i.current = pair{key, certs[0]}
	switch {
	case matches(key, certs[0]):
		if matches(nextKey, nextCert) {
			i.next = &pair{nextKey, nextCert}
		}
	case matches(key, nextCert):
		// The crash came between the two renames of a promotion.
		if err := i.fs.Rename(i.path(nextCertFile), i.path(certFile)); err != nil {
			return fmt.Errorf("finish the renewal of the identity: %w", err)
		}
		i.current.cert = nextCert
	default:
		return fmt.Errorf("identity in %s is damaged: key.pem and cert.pem do not belong together: register again with --force", i.dir)
	}
	return nil
}

func (i *Identity) path(name string) string { return filepath.Join(i.dir, name) }

// Agent says who this host is.
func (i *Identity) Agent() Agent {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.agent
}

// SetAgent records a new name or organization; it writes only what changed.
func (i *Identity) SetAgent(name, organization string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	a := i.agent
	a.Name, a.Organization = name, organization
	if a == i.agent {
		return nil
	}
	if err := i.fs.Write(i.path(agentFile), encodeAgent(a), 0o600); err != nil {
		return err
	}
	i.agent = a
	return nil
}

// Credential is what to dial with: the next pair if there is one (next is true
// then), else the current one. The Config trusts the known authorities alone and
// verifies the server's name, use and validity; a failure is a *proto.Error with
// code CLOCK_SKEW or WRONG_CONTROL_PLANE.
func (i *Identity) Credential() (config *tls.Config, notAfter time.Time, next bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	p := i.current
	if i.next != nil {
		p, next = *i.next, true
	}
	return clientTLS(p, i.authorities, i.now), p.cert.NotAfter, next
}

// Validity is the current certificate's.
func (i *Identity) Validity() (notBefore, notAfter time.Time) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.current.cert.NotBefore, i.current.cert.NotAfter
}

// Serial is the current certificate's, in hex.
func (i *Identity) Serial() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.current.cert.SerialNumber.Text(16)
}

// Request makes a new key and returns a certificate request for it (PKCS #10,
// DER). A pair that waits for its proof, or an earlier request, is dropped.
func (i *Identity) Request() ([]byte, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := i.discardLocked(); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	text, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	if err := i.fs.Write(i.path(nextKeyFile), text, 0o600); err != nil {
		return nil, fmt.Errorf("keep the next key: %w", err)
	}
	i.pendingKey = key
	return newCSR(key)
}

// Accept stores the certificate that answers the last Request, and the
// authorities that came with it. Credential returns the new pair from then on.
func (i *Identity) Accept(certDER []byte, authorities [][]byte) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.pendingKey == nil {
		return errors.New("a certificate came that nobody asked for")
	}
	cas, err := parseAuthorities(authorities)
	if err != nil {
		return err
	}
	cert, err := checkIssued(certDER, i.pendingKey, cas, i.now())
	if err != nil {
		return err
	}
	if err := i.setAuthoritiesLocked(cas); err != nil {
		return err
	}
	if err := i.fs.Write(i.path(nextCertFile), encodeCertificates(cert), 0o600); err != nil {
		return fmt.Errorf("keep the next certificate: %w", err)
	}
	i.next, i.pendingKey = &pair{i.pendingKey, cert}, nil
	return nil
}

// Promote makes the next pair the current one, after it was used with success.
// Without a next pair it does nothing.
func (i *Identity) Promote() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.promoteLocked()
}

func (i *Identity) promoteLocked() error {
	if i.next == nil {
		return nil
	}
	// The key first: Open recognises key.pem with next-cert.pem, see load.
	if !i.keyMoved {
		err := i.fs.Rename(i.path(nextKeyFile), i.path(keyFile))
		if _, gone := os.Lstat(i.path(nextKeyFile)); err != nil && !errors.Is(gone, fs.ErrNotExist) {
			return fmt.Errorf("promote the next key: %w", err)
		}
		i.keyMoved = true
	}
	if err := i.fs.Rename(i.path(nextCertFile), i.path(certFile)); err != nil {
		return fmt.Errorf("promote the next certificate: %w", err)
	}
	i.current, i.next, i.keyMoved = *i.next, nil, false
	return nil
}

// Discard drops the next pair: the control plane refused it.
func (i *Identity) Discard() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.discardLocked()
}

func (i *Identity) discardLocked() error {
	if i.keyMoved { // the old key is gone: there is no way back
		return i.promoteLocked()
	}
	i.pendingKey, i.next = nil, nil
	// The certificate first: a key alone is ignored by load.
	for _, name := range []string{nextCertFile, nextKeyFile} {
		if err := i.fs.Remove(i.path(name)); err != nil {
			return fmt.Errorf("drop the next pair: %w", err)
		}
	}
	return nil
}

// SetAuthorities replaces the CAs to trust (DER); it writes only what changed.
func (i *Identity) SetAuthorities(ders [][]byte) error {
	cas, err := parseAuthorities(ders)
	if err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.setAuthoritiesLocked(cas)
}

func (i *Identity) setAuthoritiesLocked(cas []*x509.Certificate) error {
	if sameCertificates(cas, i.authorities) {
		return nil
	}
	if err := i.fs.Write(i.path(authoritiesFile), encodeCertificates(cas...), 0o600); err != nil {
		return fmt.Errorf("keep the authorities: %w", err)
	}
	i.authorities = cas
	return nil
}

func parseAuthorities(ders [][]byte) ([]*x509.Certificate, error) {
	if len(ders) == 0 || len(ders) > maxAuthorities {
		return nil, proto.Errorf(proto.CodeInvalid, "the control plane sent %d authorities, not 1 to %d", len(ders), maxAuthorities)
	}
	var cas []*x509.Certificate
	for _, der := range ders {
		ca, err := x509.ParseCertificate(der)
		if err != nil || !ca.IsCA || !ca.BasicConstraintsValid {
			return nil, proto.Errorf(proto.CodeInvalid, "the control plane sent an authority that is no CA certificate")
		}
		cas = append(cas, ca)
	}
	return cas, nil
}
