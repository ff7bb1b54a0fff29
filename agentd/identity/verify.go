package identity

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/postern-dev/postern/proto"
)

// ServerName is the name in the control plane's certificate for the inner TLS,
// wherever it runs.
const ServerName = "controlplane.postern.internal"

// clientTLS is the inner client side for a pair. The standard verification is
// replaced, not dropped: verifyServer tells a wrong clock from a wrong server.
func clientTLS(p pair, authorities []*x509.Certificate, now func() time.Time) *tls.Config {
	roots := x509.NewCertPool()
	var names []string
	for _, ca := range authorities {
		roots.AddCert(ca)
		names = append(names, trustName(sha256.Sum256(ca.Raw)))
	}
	config := baseTLS(func(certs []*x509.Certificate) error { return verifyServer(certs, roots, now()) })
	config.NextProtos = names
	config.Certificates = []tls.Certificate{{Certificate: [][]byte{p.cert.Raw}, PrivateKey: p.key, Leaf: p.cert}}
	// Always send ours: the server names no acceptable CAs that an expired or
	// rotated one could fail to match.
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &config.Certificates[0], nil }
	return config
}

// PinnedTLS is the inner client side for a host without an identity: no client
// certificate, and a server whose chain leads to the one CA certificate with
// this SHA-256 (of its DER). Its failures are a *proto.Error with code
// WRONG_CONTROL_PLANE or CLOCK_SKEW.
func PinnedTLS(fingerprint [sha256.Size]byte) *tls.Config {
	return pinnedTLS(fingerprint, time.Now)
}

func pinnedTLS(fingerprint [sha256.Size]byte, now func() time.Time) *tls.Config {
	config := baseTLS(func(certs []*x509.Certificate) error {
		roots := x509.NewCertPool()
		found := false
		for _, c := range certs {
			if c.IsCA && c.BasicConstraintsValid && sha256.Sum256(c.Raw) == fingerprint {
				roots.AddCert(c)
				found = true
			}
		}
		if !found {
			return &proto.Error{
				Code: proto.CodeWrongControlPlane,
				Message: fmt.Sprintf("the registration key is for the control plane whose CA has fingerprint %s…, and this one presented another: check --url, or something stands in between",
					hex.EncodeToString(fingerprint[:8])),
			}
		}
		return verifyServer(certs, roots, now())
	})
	config.NextProtos = []string{trustName(fingerprint)}
	return config
}

// trustName is a protocol, in the sense of ALPN, that is never agreed on: it tells the control
// plane that this host trusts the CA with this fingerprint, so that while a CA is being replaced
// it shows a certificate of the right one. See tunnel/spec.md.
func trustName(fingerprint [sha256.Size]byte) string {
	return "postern-ca/" + hex.EncodeToString(fingerprint[:16])
}

func baseTLS(verify func([]*x509.Certificate) error) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		ServerName:             ServerName,
		SessionTicketsDisabled: true, // each handshake proves the certificate anew
		InsecureSkipVerify:     true, // replaced by VerifyConnection, which runs on every handshake
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 {
				return proto.Errorf(proto.CodeWrongControlPlane, "the control plane presented no certificate")
			}
			return verify(state.PeerCertificates)
		},
	}
}

// verifyServer checks chain, name and use at a moment within the leaf's life,
// and only then whether that life includes now: so a wrong clock is not taken
// for a wrong server.
func verifyServer(certs []*x509.Certificate, roots *x509.CertPool, now time.Time) error {
	leaf := certs[0]
	intermediates := x509.NewCertPool()
	for _, c := range certs[1:] {
		intermediates.AddCert(c)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		DNSName: ServerName, Roots: roots, Intermediates: intermediates,
		KeyUsages:   []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		CurrentTime: leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2),
	})
	if err != nil {
		return &proto.Error{
			Code:    proto.CodeWrongControlPlane,
			Message: "the control plane's certificate is not from an authority this host trusts: check url, or register again (" + reason(err) + ")",
			Err:     err,
		}
	}
	from, to := lifetime(chains[0])
	if now.Before(from) || now.After(to) {
		return clockError(now, from, to)
	}
	return nil
}

// lifetime is when every certificate of the chain is valid.
func lifetime(chain []*x509.Certificate) (from, to time.Time) {
	from, to = chain[0].NotBefore, chain[0].NotAfter
	for _, c := range chain[1:] {
		if c.NotBefore.After(from) {
			from = c.NotBefore
		}
		if c.NotAfter.Before(to) {
			to = c.NotAfter
		}
	}
	return from, to
}

func clockError(now, from, to time.Time) error {
	return proto.Errorf(proto.CodeClockSkew, "this host's clock says %s, the control plane's certificate is valid from %s to %s: mend the clock (is NTP running?)",
		stamp(now), stamp(from), stamp(to))
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05Z") }

func reason(err error) string {
	var unknown x509.UnknownAuthorityError
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown):
		return "unknown authority"
	case errors.As(err, &name):
		return "it is for another name"
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		return "it is not for servers"
	}
	return "invalid"
}

// checkIssued checks a certificate that was issued to this host: ours, signed by
// one of cas, good for a client, valid now.
func checkIssued(der []byte, key *ecdsa.PrivateKey, cas []*x509.Certificate, now time.Time) (*x509.Certificate, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, proto.Errorf(proto.CodeInvalid, "the control plane sent a certificate that cannot be read")
	}
	if !matches(key, cert) {
		return nil, proto.Errorf(proto.CodeInvalid, "the control plane sent a certificate for another key")
	}
	roots := x509.NewCertPool()
	for _, ca := range cas {
		roots.AddCert(ca)
	}
	if _, err := cert.Verify(x509.VerifyOptions{
		Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		CurrentTime: cert.NotBefore.Add(cert.NotAfter.Sub(cert.NotBefore) / 2),
	}); err != nil {
		return nil, &proto.Error{Code: proto.CodeInvalid, Message: "the control plane sent a certificate that none of its authorities signed for a client", Err: err}
	}
	if now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
		return nil, proto.Errorf(proto.CodeClockSkew, "this host's clock says %s, the certificate just issued is valid from %s to %s: mend the clock (is NTP running?)",
			stamp(now), stamp(cert.NotBefore), stamp(cert.NotAfter))
	}
	return cert, nil
}
