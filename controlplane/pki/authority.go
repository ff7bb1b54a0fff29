package pki

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"sync"
	"sync/atomic"
	"time"

	"github.com/postern-dev/postern/controlplane/masterkey"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// States of an authority in the store.
const (
	// StateActive issues; there is one.
	StateActive = "active"
	// StateTrusted is believed but issues nothing.
	StateTrusted = "trusted"
)

const (
	authorityLife = 10 * 365 * 24 * time.Hour
	// authorityBackdate lets a host whose clock is behind get as far as being
	// told so.
	authorityBackdate = 24 * time.Hour
	// DefaultGrace is how long after its end a certificate is good for rejoining.
	DefaultGrace = 30 * 24 * time.Hour
)

// Store keeps the authorities. Both errors below are codes of package proto.
type Store interface {
	// ListAuthorities lists those that are active or trusted, the active first.
	ListAuthorities(ctx context.Context) ([]*posternv1.Authority, error)
	// SealedAuthorityKey returns NOT_FOUND for an unknown one.
	SealedAuthorityKey(ctx context.Context, fingerprint string) ([]byte, error)
	// InsertAuthority returns ALREADY_EXISTS for a second active one.
	InsertAuthority(ctx context.Context, fingerprint string, certificate, sealedKey []byte, state string, now time.Time) error
	// ActivateAuthority makes a trusted one active, and the active one trusted.
	ActivateAuthority(ctx context.Context, fingerprint string) error
	// RetireAuthority ends the trust in one, which is not active, and removes its key.
	RetireAuthority(ctx context.Context, fingerprint string) error
}

// Config is what an Authority needs.
type Config struct {
	Store Store
	// MasterKeyFile is DIR/master.key (package masterkey). Control planes that share a store share
	// its content.
	MasterKeyFile string
	// Prepare is called with the master keys before anything is sealed or opened: it says which one
	// seals. Optional; nil means the oldest.
	Prepare func(context.Context, *masterkey.Keys) error
	// Grace is how long after its end an agent's certificate is good for
	// rejoining; zero means DefaultGrace.
	Grace time.Duration
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// Authority issues and verifies certificates.
type Authority struct {
	store Store
	keys  *masterkey.Keys
	grace time.Duration
	now   func() time.Time

	trust atomic.Pointer[trust]

	serverMu sync.Mutex
	servers  map[string]*serving // by authority, of those trusted; guarded by serverMu
}

// serving is a certificate of the tunnel endpoint.
type serving struct {
	certificate *tls.Certificate
	renewAt     time.Time
}

// known is an authority that is trusted.
type known struct {
	certificate *x509.Certificate
	signer      *ecdsa.PrivateKey // nil of one whose key is not here: it is believed all the same
	trustName   string
}

// trust is what was last read of the store; it is never changed.
type trust struct {
	active *x509.Certificate
	signer *ecdsa.PrivateKey
	all    []*known // the active one first
	pool   *x509.CertPool
	ders   [][]byte // the active one first
}

// Open reads the authorities, and makes the first one in an empty store.
func Open(ctx context.Context, cfg Config) (*Authority, error) {
	a := &Authority{store: cfg.Store, grace: cfg.Grace, now: cfg.Now}
	if a.grace == 0 {
		a.grace = DefaultGrace
	}
	if a.now == nil {
		a.now = time.Now
	}
	known, err := a.store.ListAuthorities(ctx)
	if err != nil {
		return nil, err
	}
	a.keys, err = masterkey.Open(cfg.MasterKeyFile)
	switch {
	case errors.Is(err, fs.ErrNotExist) && len(known) > 0:
		return nil, fmt.Errorf("master key: %s is missing, and the CA's key in the database is sealed with it: copy the file from another control plane of this installation or from a backup", cfg.MasterKeyFile)
	case errors.Is(err, fs.ErrNotExist):
		a.keys, err = masterkey.Create(cfg.MasterKeyFile)
	}
	if err != nil {
		return nil, err
	}
	masterkey.Sweep(cfg.MasterKeyFile)
	if cfg.Prepare != nil {
		if err := cfg.Prepare(ctx, a.keys); err != nil {
			return nil, err
		}
	}
	if len(known) == 0 {
		// Of several control planes that start together one makes the CA.
		if err := a.create(ctx, StateActive); err != nil && proto.CodeOf(err) != proto.CodeAlreadyExists {
			return nil, fmt.Errorf("make the certificate authority: %w", err)
		}
	}
	if err := a.Reload(ctx); err != nil {
		return nil, err
	}
	return a, nil
}

func (a *Authority) create(ctx context.Context, state string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := newSerial()
	if err != nil {
		return err
	}
	now := a.now()
	if t := a.trust.Load(); t != nil {
		// Certificates know whole seconds, and the order of authorities is told by them.
		if last := t.active.NotBefore.Add(authorityBackdate + time.Second); now.Before(last) {
			now = last
		}
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "Postern CA " + SerialText(serial)[:8]},
		NotBefore: now.Add(-authorityBackdate), NotAfter: now.Add(authorityLife),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	plain, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	fingerprint := fingerprintText(der)
	sealed, err := a.box().Seal(plain, fingerprint)
	if err != nil {
		return err
	}
	return a.store.InsertAuthority(ctx, fingerprint, der, sealed, state, now)
}

// Keys are the master keys.
func (a *Authority) Keys() *masterkey.Keys { return a.keys }

// box seals the authorities' private keys; each is bound to its certificate's fingerprint.
func (a *Authority) box() *masterkey.Box { return a.keys.Box("") }

// Reseal seals an authority's private key, as it rests in the store, with the master key that seals at present.
func (a *Authority) Reseal(fingerprint string, sealed []byte) ([]byte, error) {
	return a.box().Reseal(sealed, fingerprint)
}

// Reload reads the authorities again; another control plane may have rotated
// them.
func (a *Authority) Reload(ctx context.Context) error {
	listed, err := a.store.ListAuthorities(ctx)
	if err != nil {
		return err
	}
	t := &trust{pool: x509.NewCertPool()}
	for _, one := range listed {
		block, _ := pem.Decode([]byte(one.Certificate))
		if block == nil {
			return fmt.Errorf("certificate authority %s in the store is no certificate", one.Fingerprint)
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return fmt.Errorf("certificate authority %s in the store: %w", one.Fingerprint, err)
		}
		if fingerprintText(certificate.Raw) != one.Fingerprint {
			return fmt.Errorf("certificate authority %s in the store has another certificate's bytes", one.Fingerprint)
		}
		t.pool.AddCert(certificate)
		t.ders = append(t.ders, certificate.Raw)
		signer, err := a.signer(ctx, one.Fingerprint, certificate)
		if err != nil && one.State == StateActive {
			return err
		}
		t.all = append(t.all, &known{certificate, signer, TrustName(certificate.Raw)})
		if one.State == StateActive {
			t.signer, t.active = signer, certificate
		}
	}
	if t.active == nil {
		return errors.New("no certificate authority in the store is active")
	}
	a.trust.Store(t)
	return nil
}

func (a *Authority) signer(ctx context.Context, fingerprint string, certificate *x509.Certificate) (*ecdsa.PrivateKey, error) {
	sealed, err := a.store.SealedAuthorityKey(ctx, fingerprint)
	if err != nil {
		return nil, err
	}
	plain, err := a.box().Open(sealed, fingerprint)
	var lacks *masterkey.NoKeyError
	if errors.As(err, &lacks) {
		return nil, fmt.Errorf("the CA's private key does not open: %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("the CA's private key does not open: %w: use the master.key that belongs to this database", err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(plain)
	if err != nil {
		return nil, errors.New("the CA's private key in the store is no PKCS #8 key")
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(certificate.PublicKey) {
		return nil, errors.New("the CA's private key in the store does not belong to its certificate")
	}
	return key, nil
}

// Fingerprint is the SHA-256 of the newest authority's certificate (DER), announced or active: what a
// registration key carries.
func (a *Authority) Fingerprint() [sha256.Size]byte {
	t := a.trust.Load()
	newest := t.all[0]
	for _, one := range t.all {
		if one.signer != nil && one.certificate.NotBefore.After(newest.certificate.NotBefore) {
			newest = one
		}
	}
	return sha256.Sum256(newest.certificate.Raw)
}

// Certificates are the authorities to trust, DER, the active one first. The
// caller does not change them.
func (a *Authority) Certificates() [][]byte { return a.trust.Load().ders }

// Authorities are the same for people.
func (a *Authority) Authorities(ctx context.Context) ([]*posternv1.Authority, error) {
	return a.store.ListAuthorities(ctx)
}

// Grace is how long after its end an agent's certificate is good for rejoining.
func (a *Authority) Grace() time.Duration { return a.grace }

func fingerprintText(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// newSerial is 128 random bits, but not zero.
func newSerial() (*big.Int, error) {
	var b [16]byte
	for {
		if _, err := rand.Read(b[:]); err != nil {
			return nil, err
		}
		if serial := new(big.Int).SetBytes(b[:]); serial.Sign() > 0 {
			return serial, nil
		}
	}
}

// SerialText is a serial as the store and the logs have it: at least 32
// lower-case hex digits.
func SerialText(serial *big.Int) string { return fmt.Sprintf("%032x", serial) }
