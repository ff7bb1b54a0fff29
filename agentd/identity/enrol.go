package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/postern-dev/postern/agentd/atomicfile"
	"github.com/postern-dev/postern/proto"
)

// stagingName is where an identity is put together before it is installed.
const stagingName = ".identity-new"

// Enrolment is an identity in the making. The key is on disk before a
// registration key is spent, so that a full or read-only disk costs no use.
type Enrolment struct {
	state string
	fs    atomicfile.FS
	key   *ecdsa.PrivateKey
	now   func() time.Time
}

// Enrol begins a registration: it makes stateDir if need be and a new key in it.
// An existing identity is an error with code ALREADY_EXISTS unless force is
// set; it stays in place until Finish. What an earlier attempt left is removed.
func Enrol(stateDir string, force bool) (*Enrolment, error) {
	return enrol(stateDir, force, atomicfile.FS{})
}

func enrol(stateDir string, force bool, files atomicfile.FS) (*Enrolment, error) {
	if _, err := os.Lstat(Dir(stateDir)); err == nil && !force {
		name := "this host"
		if i, err := Open(stateDir); err == nil {
			a := i.Agent()
			name = fmt.Sprintf("this host is agent %s of %s already: it", a.Name, a.URL)
		}
		return nil, proto.Errorf(proto.CodeAlreadyExists, "%s has an identity in %s: use --force to replace it", name, Dir(stateDir))
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return nil, fmt.Errorf("make the state directory: %w", err)
	}
	e := &Enrolment{state: stateDir, fs: files, now: time.Now}
	if err := os.RemoveAll(e.staging()); err != nil {
		return nil, err
	}
	if err := os.Mkdir(e.staging(), 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	text, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	if err := e.fs.Write(filepath.Join(e.staging(), keyFile), text, 0o600); err != nil {
		return nil, fmt.Errorf("keep the key: %w", err)
	}
	e.key = key
	return e, nil
}

func (e *Enrolment) staging() string { return filepath.Join(e.state, stagingName) }

// CSR is the certificate request for the new key (PKCS #10, DER).
func (e *Enrolment) CSR() ([]byte, error) { return newCSR(e.key) }

// Finish installs the identity. After a crash at any step the old identity, if
// any, or the new one is whole.
func (e *Enrolment) Finish(agent Agent, certDER []byte, authorities [][]byte) error {
	if agent.AgentID == "" || agent.Name == "" || agent.Organization == "" {
		return proto.Errorf(proto.CodeInvalid, "the control plane's answer lacks the agent's id, name or organization")
	}
	cas, err := parseAuthorities(authorities)
	if err != nil {
		return err
	}
	cert, err := checkIssued(certDER, e.key, cas, e.now())
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
	}{
		{certFile, encodeCertificates(cert)},
		{authoritiesFile, encodeCertificates(cas...)},
		{agentFile, encodeAgent(agent)},
	} {
		if err := e.fs.Write(filepath.Join(e.staging(), f.name), f.data, 0o600); err != nil {
			return fmt.Errorf("keep the identity: %w", err)
		}
	}
	if err := e.fs.Exchange(e.staging(), Dir(e.state)); err != nil {
		return err
	}
	return e.Abandon() // what is there now is the identity that was replaced
}

// Abandon removes what Enrol made.
func (e *Enrolment) Abandon() error { return os.RemoveAll(e.staging()) }
