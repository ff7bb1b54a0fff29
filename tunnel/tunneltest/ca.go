package tunneltest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"time"
)

// ServerName is the name in the server certificates of a CA.
const ServerName = "control-plane.test"

// CA is a throwaway certificate authority.
type CA struct {
	Cert *x509.Certificate
	Pool *x509.CertPool
	key  *ecdsa.PrivateKey
}

// NewCA makes a CA that is valid for a day. It panics if it cannot, which only a
// broken random source causes.
func NewCA() *CA {
	key := newKey()
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "tunneltest CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der := must(x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key))
	ca := &CA{Cert: must(x509.ParseCertificate(der)), key: key, Pool: x509.NewCertPool()}
	ca.Pool.AddCert(ca.Cert)
	return ca
}

// Issue makes a certificate for name with a key of its own, good for clients and
// servers; it also names localhost and the loopback addresses.
func (ca *CA) Issue(name string) tls.Certificate {
	key := newKey()
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(12 * time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		DNSNames:    []string{name, ServerName, "localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	der := must(x509.CreateCertificate(rand.Reader, tmpl, ca.Cert, key.Public(), ca.key))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: must(x509.ParseCertificate(der))}
}

// ServerTLS is an inner TLS configuration for an acceptor that requires client
// certificates of the CA.
func (ca *CA) ServerTLS() *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{ca.Issue(ServerName)},
		ClientAuth:   tls.RequireAndVerifyClientCert, ClientCAs: ca.Pool,
	}
}

// ClientTLS is an inner TLS configuration for a dialer of that name.
func (ca *CA) ClientTLS(name string) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{ca.Issue(name)}, RootCAs: ca.Pool, ServerName: ServerName}
}

func newKey() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) }

func serial() *big.Int { return must(rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
