package pki

import (
	"crypto/x509"
	"time"
)

// Seams for tests alone.

// ParseIdentityURI is parseIdentityURI.
var ParseIdentityURI = parseIdentityURI

// IdentityURI is identityURI.
var IdentityURI = identityURI

// Sign signs any template with the active authority's key.
func (a *Authority) Sign(template *x509.Certificate, public any) (*x509.Certificate, error) {
	return sign(a.trust.Load(), template, public)
}

// Verify is verify.
func (a *Authority) Verify(c *x509.Certificate, now time.Time) (Identity, error) {
	return a.verify(c, now)
}

// PrivateKeys are the active authority's private key in the forms in which it
// might have leaked: PKCS #8 and the bare scalar.
func PrivateKeys(a *Authority) [][]byte {
	pkcs8, err := x509.MarshalPKCS8PrivateKey(a.trust.Load().signer)
	if err != nil {
		panic(err)
	}
	scalar, err := a.trust.Load().signer.Bytes()
	if err != nil {
		panic(err)
	}
	return [][]byte{pkcs8, scalar}
}
