package identity

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"regexp"

	"github.com/postern-dev/postern/proto"
)

// peerURI is the one URI of an agent's certificate: postern://ORGANIZATION/agent/AGENT.
var peerURI = regexp.MustCompile(`^postern://(org_[0-9a-z]{1,40})/agent/(agt_[0-9a-z]{1,40})$`)

// Sign signs a statement for other hosts of the organization: see VerifyPeer. It returns
// this host's certificate (DER) and an ECDSA signature (ASN.1) over the statement's
// SHA-256.
func (i *Identity) Sign(statement []byte) (certificate, signature []byte, err error) {
	i.mu.Lock()
	p := i.current
	i.mu.Unlock()
	sum := sha256.Sum256(statement)
	signature, err = ecdsa.SignASN1(rand.Reader, p.key, sum[:])
	return p.cert.Raw, signature, err
}

// VerifyPeer checks a statement that another host signed, and returns the id of its
// agent. The certificate must be an agent's of this host's organization, from an
// authority that this host trusts, and valid now. Its errors are a *proto.Error with
// code INVALID or CLOCK_SKEW.
func (i *Identity) VerifyPeer(certificate, signature, statement []byte) (agent string, err error) {
	i.mu.Lock()
	authorities, own := i.authorities, i.current.cert
	i.mu.Unlock()
	cert, err := x509.ParseCertificate(certificate)
	if err != nil {
		return "", proto.Errorf(proto.CodeInvalid, "the other host's certificate cannot be read")
	}
	organization, _ := namesOf(own)
	theirs, agent := namesOf(cert)
	if agent == "" || theirs != organization {
		return "", proto.Errorf(proto.CodeInvalid, "the other host's certificate is not an agent's of this organization")
	}
	roots := x509.NewCertPool()
	for _, ca := range authorities {
		roots.AddCert(ca)
	}
	if _, err := cert.Verify(x509.VerifyOptions{
		Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		CurrentTime: cert.NotBefore.Add(cert.NotAfter.Sub(cert.NotBefore) / 2),
	}); err != nil {
		return "", &proto.Error{Code: proto.CodeInvalid, Message: "the other host's certificate is from no authority that this host trusts", Err: err}
	}
	if now := i.now(); now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
		return "", proto.Errorf(proto.CodeClockSkew, "this host's clock says %s, the other host's certificate is valid from %s to %s: mend the clocks (is NTP running?)",
			stamp(now), stamp(cert.NotBefore), stamp(cert.NotAfter))
	}
	key, ok := cert.PublicKey.(*ecdsa.PublicKey)
	sum := sha256.Sum256(statement)
	if !ok || !ecdsa.VerifyASN1(key, sum[:], signature) {
		return "", proto.Errorf(proto.CodeInvalid, "the other host's signature is wrong")
	}
	return agent, nil
}

// namesOf are the ids in an agent's certificate; empty if it is none.
func namesOf(cert *x509.Certificate) (organization, agent string) {
	if cert == nil || cert.IsCA || len(cert.URIs) != 1 {
		return "", ""
	}
	if m := peerURI.FindStringSubmatch(cert.URIs[0].String()); m != nil {
		return m[1], m[2]
	}
	return "", ""
}
