package pki

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"strings"
	"time"

	"github.com/postern-dev/postern/proto"
)

// Stages of a rotation.
const (
	// StageStable: there is one authority.
	StageStable = "stable"
	// StageAnnounced: the new one is trusted by everybody who asks, and issues nothing yet, so that
	// every control plane knows it before any of them does.
	StageAnnounced = "announced"
	// StageRenewing: the new one issues. The old one is trusted still, and vouches for the tunnel
	// endpoint to hosts that do not know the new one.
	StageRenewing = "renewing"
)

// TrustProtocol begins the names of protocols, in the sense of ALPN, by which a host says which
// authorities it trusts: the rest is the first 16 bytes of the SHA-256 of the certificate's DER, in
// lower-case hex. They are never negotiated; the endpoint picks the certificate that it shows by them.
const TrustProtocol = "postern-ca/"

// TrustName is the protocol by which a host says that it trusts an authority (DER).
func TrustName(der []byte) string {
	sum := sha256.Sum256(der)
	return TrustProtocol + hex.EncodeToString(sum[:16])
}

// Rotation is how far a rotation is.
type Rotation struct {
	Stage string
	// Active, Next and Old are fingerprints: Next is set when announced, Old when renewing.
	Active, Next, Old string
	// Since is when the newest authority was made.
	Since time.Time
}

// Rotation tells how far a rotation is, as of the last Reload.
func (a *Authority) Rotation() Rotation {
	t := a.trust.Load()
	r := Rotation{Stage: StageStable, Active: fingerprintText(t.active.Raw), Since: t.active.NotBefore.Add(authorityBackdate)}
	for _, one := range t.all {
		made := one.certificate.NotBefore.Add(authorityBackdate)
		switch {
		case one.certificate == t.active:
		case one.certificate.NotBefore.After(t.active.NotBefore):
			return Rotation{Stage: StageAnnounced, Active: r.Active, Next: fingerprintText(one.certificate.Raw), Since: made}
		default:
			r.Stage, r.Old = StageRenewing, fingerprintText(one.certificate.Raw)
		}
	}
	return r
}

// Announce begins a rotation: it makes an authority that is trusted and issues nothing yet. During
// a rotation it is ALREADY_EXISTS.
func (a *Authority) Announce(ctx context.Context) error {
	if err := a.Reload(ctx); err != nil {
		return err
	}
	if r := a.Rotation(); r.Stage != StageStable {
		return proto.Errorf(proto.CodeAlreadyExists, "a rotation of the certificate authority is under way")
	}
	if err := a.create(ctx, StateTrusted); err != nil {
		return err
	}
	return a.Reload(ctx)
}

// Activate lets the announced authority issue; the one before is trusted from then on.
func (a *Authority) Activate(ctx context.Context, fingerprint string) error {
	if err := a.store.ActivateAuthority(ctx, fingerprint); err != nil {
		return err
	}
	return a.Reload(ctx)
}

// Retire ends the trust in an authority that is not active; its private key is removed.
func (a *Authority) Retire(ctx context.Context, fingerprint string) error {
	if err := a.store.RetireAuthority(ctx, fingerprint); err != nil {
		return err
	}
	return a.Reload(ctx)
}

// voucher is the authority that the endpoint's certificate is to be of for a host that says it
// trusts these: the active one if it is among them; for a host that says nothing, as those of
// versions before do, the oldest one that is trusted, which every host knows.
func (t *trust) voucher(hello *tls.ClientHelloInfo) *known {
	oldest := t.all[0]
	for _, one := range t.all {
		if one.signer != nil && one.certificate.NotBefore.Before(oldest.certificate.NotBefore) {
			oldest = one
		}
	}
	if hello == nil {
		return oldest
	}
	var says bool
	var fits *known
	for _, name := range hello.SupportedProtos {
		if !strings.HasPrefix(name, TrustProtocol) {
			continue
		}
		says = true
		for _, one := range t.all {
			if one.trustName == name && one.signer != nil && (fits == nil || one.certificate == t.active) {
				fits = one
			}
		}
	}
	switch {
	case fits != nil:
		return fits
	case says: // it knows none of ours: it will say so by itself
		return t.all[0]
	}
	return oldest
}
