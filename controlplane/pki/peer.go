package pki

import (
	"bytes"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"time"
)

// errNotAPeer is returned when the other end of a connection between control planes does
// not hold the same master key.
var errNotAPeer = errors.New("the other end does not prove this installation's master key: do both control planes have the same DATA/master.key?")

// PeerTLS is how control planes of one installation talk to each other: TLS 1.3, both
// ends with a key derived from the master key, which is the same for all of them.
// Each end accepts that one public key and nothing else: neither names nor dates nor the
// agents' CA count, so rotating the CA changes nothing here, and who can write the
// database can point a replica at another address but not answer there.
func (a *Authority) PeerTLS() (*tls.Config, error) {
	seed, err := hkdf.Key(sha256.New, a.master[:], nil, "postern peers", ed25519.SeedSize)
	if err != nil {
		return nil, err
	}
	key := ed25519.NewKeyFromSeed(seed)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Postern control plane"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280 4.1.2.5: no end
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}},
		ClientAuth:             tls.RequireAnyClientCert,
		InsecureSkipVerify:     true, // VerifyConnection does it
		SessionTicketsDisabled: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			// The handshake has proved that the other end has this certificate's private key.
			if len(state.PeerCertificates) == 0 || !bytes.Equal(state.PeerCertificates[0].RawSubjectPublicKeyInfo, leaf.RawSubjectPublicKeyInfo) {
				return errNotAPeer
			}
			return nil
		},
	}, nil
}
