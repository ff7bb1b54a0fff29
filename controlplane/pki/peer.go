package pki

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"slices"
	"sync"
	"time"
)

// errNotAPeer is returned when the other end of a connection between control planes does
// not hold the same master key.
var errNotAPeer = errors.New("the other end does not prove this installation's master key: do both control planes have the same DATA/master.key?")

// PeerTLS is how control planes of one installation talk to each other: TLS 1.3, both
// ends with a key derived from the master key, which is the same for all of them.
// Each end accepts that one public key and nothing else: neither names nor dates nor the
// agents' CA count, so rotating the CA changes nothing here, and who can write the
// database can point a replica at another address but not answer there. While the master key is
// replaced the keys derived from both are accepted, and each new connection is asked by the keys of that moment.
func (a *Authority) PeerTLS() (*tls.Config, error) {
	own, err := a.peerCertificate()
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	current := func() (*tls.Certificate, error) {
		key, _, err := a.keys.Peer()
		if err != nil {
			return nil, err
		}
		mu.Lock()
		defer mu.Unlock()
		if !key.Equal(own.PrivateKey) {
			if own, err = a.peerCertificate(); err != nil {
				return nil, err
			}
		}
		return own, nil
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return current() },
		GetClientCertificate:   func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return current() },
		ClientAuth:             tls.RequireAnyClientCert,
		InsecureSkipVerify:     true, // VerifyConnection does it
		SessionTicketsDisabled: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			// The handshake has proved that the other end has this certificate's private key.
			if len(state.PeerCertificates) == 0 {
				return errNotAPeer
			}
			_, accepted, err := a.keys.Peer()
			if err != nil {
				return err
			}
			shown, ok := state.PeerCertificates[0].PublicKey.(ed25519.PublicKey)
			if !ok || !slices.ContainsFunc(accepted, func(key ed25519.PublicKey) bool { return key.Equal(shown) }) {
				return errNotAPeer
			}
			return nil
		},
	}, nil
}

func (a *Authority) peerCertificate() (*tls.Certificate, error) {
	key, _, err := a.keys.Peer()
	if err != nil {
		return nil, err
	}
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
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, nil
}
