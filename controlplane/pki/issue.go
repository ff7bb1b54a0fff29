package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net/url"
	"time"

	"github.com/postern-dev/postern/proto"
)

const (
	// ServerName is the name in the tunnel endpoint's inner certificate, whatever
	// the control plane is called outside.
	ServerName = "controlplane.postern.internal"

	agentLife     = 24 * time.Hour
	agentBackdate = 5 * time.Minute // for hosts whose clock is a little behind
	serverLife    = 24 * time.Hour
	// serverBackdate is long, so that a host whose clock is far behind is told so
	// by the answer to its first request and not by a TLS alert.
	serverBackdate = 24 * time.Hour

	// maxCSR bounds a certificate request, in bytes; a good one has about 300.
	maxCSR = 8 << 10
)

// IssueAgent makes an agent's certificate of a PKCS #10 request (DER). Of the
// request only the public key is taken, which must be ECDSA P-256 and have
// signed it: INVALID otherwise.
func (a *Authority) IssueAgent(csr []byte, organization, agent string, now time.Time) (*x509.Certificate, error) {
	public, err := requestKey(csr)
	if err != nil {
		return nil, err
	}
	name, err := url.Parse(identityURI(organization, agent))
	if err != nil {
		return nil, err
	}
	if _, _, err := parseIdentityURI(name.String()); err != nil {
		return nil, fmt.Errorf("issue a certificate: %w", err)
	}
	return a.trust.Load().all[0].issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: agent}, URIs: []*url.URL{name},
		NotBefore: now.Add(-agentBackdate), NotAfter: now.Add(agentLife),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, public)
}

func requestKey(csr []byte) (*ecdsa.PublicKey, error) {
	if len(csr) > maxCSR {
		return nil, proto.Errorf(proto.CodeInvalid, "the certificate request has %d bytes, more than %d", len(csr), maxCSR)
	}
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, &proto.Error{Code: proto.CodeInvalid, Message: "the certificate request is not PKCS #10", Err: err}
	}
	public, ok := request.PublicKey.(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, proto.Errorf(proto.CodeInvalid, "the certificate request's key is not ECDSA P-256")
	}
	if err := request.CheckSignature(); err != nil {
		return nil, &proto.Error{Code: proto.CodeInvalid, Message: "the certificate request is not signed with its own key", Err: err}
	}
	return public, nil
}

// issue completes the template and signs it.
func (k *known) issue(template *x509.Certificate, public *ecdsa.PublicKey) (*x509.Certificate, error) {
	if template.NotAfter.After(k.certificate.NotAfter) {
		return nil, fmt.Errorf("the certificate authority ends on %s: rotate it (postern ca rotate)", k.certificate.NotAfter.Format(time.DateOnly))
	}
	var err error
	if template.SerialNumber, err = newSerial(); err != nil {
		return nil, err
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.BasicConstraintsValid = true
	der, err := x509.CreateCertificate(rand.Reader, template, k.certificate, public, k.signer)
	if err != nil {
		return nil, fmt.Errorf("issue a certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}

// serverCertificate is the tunnel endpoint's own, of an authority that the host trusts, made anew at two
// thirds of its life. Its key is never stored.
func (a *Authority) serverCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	t := a.trust.Load()
	by := t.voucher(hello)
	a.serverMu.Lock()
	defer a.serverMu.Unlock()
	now := a.now()
	if s := a.servers[by.trustName]; s != nil && now.Before(s.renewAt) {
		return s.certificate, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf, err := by.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: ServerName}, DNSNames: []string{ServerName},
		NotBefore: now.Add(-serverBackdate), NotAfter: now.Add(serverLife),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, &key.PublicKey)
	if err != nil {
		return nil, err
	}
	kept := map[string]*serving{} // of authorities that are trusted still
	for _, one := range t.all {
		if s := a.servers[one.trustName]; s != nil {
			kept[one.trustName] = s
		}
	}
	s := &serving{
		certificate: &tls.Certificate{Certificate: [][]byte{leaf.Raw, by.certificate.Raw}, PrivateKey: key, Leaf: leaf},
		renewAt:     now.Add(serverLife * 2 / 3),
	}
	kept[by.trustName] = s
	a.servers = kept
	return s.certificate, nil
}
