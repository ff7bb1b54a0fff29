package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"regexp"
	"time"

	"github.com/postern-dev/postern/proto"
)

// Identity is who a certificate says its holder is. The zero Identity is a peer
// without one.
type Identity struct {
	// Organization and Agent are ids.
	Organization, Agent string
	// Serial is the certificate's; see SerialText.
	Serial string
	// Expired is set for a certificate within the grace period after its end: it
	// is good for rejoining and nothing else.
	Expired bool
}

var identityPattern = regexp.MustCompile(`^postern://(org_[0-9a-z]{1,40})/agent/(agt_[0-9a-z]{1,40})$`)

func identityURI(organization, agent string) string {
	return "postern://" + organization + "/agent/" + agent
}

func parseIdentityURI(uri string) (organization, agent string, err error) {
	parts := identityPattern.FindStringSubmatch(uri)
	if parts == nil {
		return "", "", refused("its URI is not postern://ORGANIZATION/agent/AGENT")
	}
	return parts[1], parts[2], nil
}

func refused(why string) error {
	return proto.Errorf(proto.CodeUnauthenticated, "the certificate is refused: %s", why)
}

// ParseIdentity reads the names in an agent's certificate. It verifies no
// signature and no time: see Identify.
func ParseIdentity(certificate *x509.Certificate) (Identity, error) {
	switch {
	case certificate.IsCA:
		return Identity{}, refused("it is an authority's")
	case len(certificate.URIs) != 1:
		return Identity{}, refused("it has not exactly one URI")
	case len(certificate.DNSNames) > 0 || len(certificate.IPAddresses) > 0 || len(certificate.EmailAddresses) > 0:
		return Identity{}, refused("it has names besides its URI")
	case len(certificate.ExtKeyUsage) != 1 || certificate.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth || len(certificate.UnknownExtKeyUsage) > 0:
		return Identity{}, refused("it is not for clients")
	case certificate.SerialNumber == nil || certificate.SerialNumber.Sign() <= 0:
		return Identity{}, refused("it has no serial number")
	}
	if key, ok := certificate.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		return Identity{}, refused("its key is not ECDSA P-256")
	}
	organization, agent, err := parseIdentityURI(certificate.URIs[0].String())
	if err != nil {
		return Identity{}, err
	}
	return Identity{Organization: organization, Agent: agent, Serial: SerialText(certificate.SerialNumber)}, nil
}

// Identify tells from a finished handshake who the peer is: the zero Identity
// for a peer without a certificate. The certificate must be issued by one of our
// authorities itself, for clients, and name one agent of one organization; its
// issuer and its names are judged together, and nothing else that the peer sent
// along counts. A certificate that ended longer ago than the grace period is
// IDENTITY_EXPIRED, everything else that is wrong UNAUTHENTICATED.
func (a *Authority) Identify(state tls.ConnectionState) (Identity, error) {
	if len(state.PeerCertificates) == 0 {
		return Identity{}, nil
	}
	return a.verify(state.PeerCertificates[0], a.now())
}

func (a *Authority) verify(certificate *x509.Certificate, now time.Time) (Identity, error) {
	id, err := ParseIdentity(certificate)
	if err != nil {
		return Identity{}, err
	}
	at := now
	if now.After(certificate.NotAfter) {
		// The chain is judged at the last moment at which it was to be valid.
		at, id.Expired = certificate.NotAfter, true
	}
	chains, err := certificate.Verify(x509.VerifyOptions{
		Roots: a.trust.Load().pool, Intermediates: x509.NewCertPool(), CurrentTime: at,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return Identity{}, &proto.Error{
			Code: proto.CodeUnauthenticated, Err: err,
			Message: "the certificate is refused: this control plane has not issued it, or it is not valid yet",
		}
	}
	for _, chain := range chains {
		if len(chain) != 2 {
			return Identity{}, refused("it is not issued by the authority itself")
		}
	}
	if id.Expired && now.After(certificate.NotAfter.Add(a.grace)) {
		return Identity{}, proto.Errorf(proto.CodeIdentityExpired,
			"the agent's certificate ended on %s, longer ago than the %d days within which it may rejoin: register the host anew with a registration key",
			certificate.NotAfter.UTC().Format(time.DateOnly), int(a.grace.Hours()/24))
	}
	return id, nil
}

// TLSConfig is the tunnel endpoint's side of the inner handshake; the tunnel adds
// its ALPN. A peer without a certificate is let in, to register; so is one whose
// certificate has ended, to rejoin or to be told that it is too late. Any other
// certificate that Identify refuses ends the handshake. What a peer may do is
// decided for each request.
func (a *Authority) TLSConfig() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: a.serverCertificate,
		// Asks for a certificate and has its key proved; the chain is judged below,
		// since crypto/tls itself would refuse one that has ended.
		ClientAuth: tls.RequestClientCert,
		VerifyConnection: func(state tls.ConnectionState) error {
			_, err := a.Identify(state)
			if proto.CodeOf(err) == proto.CodeIdentityExpired {
				return nil
			}
			return err
		},
		// A resumed session would outlive a revocation.
		SessionTicketsDisabled: true,
	}
}
