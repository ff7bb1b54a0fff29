package pki

import (
	"crypto/rand"
	"crypto/x509"
)

func sign(t *trust, template *x509.Certificate, public any) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, t.active, public, t.signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}
