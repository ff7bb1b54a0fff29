package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"slices"
)

// maxAuthorities bounds what a control plane may ask to be trusted: a rotation
// overlaps two, and leaves room.
const maxAuthorities = 16

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// readKey loads a private key from a file that only its owner may read.
func readKey(path string) (*ecdsa.PrivateKey, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("private key %s can be read by others (mode %04o): run chmod 0600 %s, and register again if somebody may have read it",
			path, st.Mode().Perm(), path)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode(raw)
	if block == nil || block.Type != "PRIVATE KEY" || len(bytes.TrimSpace(rest)) != 0 {
		return nil, fmt.Errorf("private key %s is damaged: register again with --force", path)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("private key %s is damaged: register again with --force", path)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("private key %s is not ECDSA P-256: register again with --force", path)
	}
	return key, nil
}

func encodeCertificates(certs ...*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certs {
		pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) //nolint:errcheck // a Buffer takes all
	}
	return b.Bytes()
}

// readCertificates loads at least one certificate. A block that is not a
// certificate is an error: it would be trusted less than its owner thinks.
func readCertificates(path string) ([]*x509.Certificate, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	certs, err := ParseBundle(raw)
	if err != nil {
		return nil, fmt.Errorf("certificate file %s: %w", path, err)
	}
	return certs, nil
}

// ParseBundle reads PEM certificates, at least one. Unlike x509.CertPool it
// refuses a malformed or foreign block instead of passing over it.
func ParseBundle(raw []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	rest := raw
	for n := 1; ; n++ {
		var block *pem.Block
		before := rest
		block, rest = pem.Decode(rest)
		if block == nil {
			if bytes.Contains(before, []byte("-----BEGIN")) {
				return nil, fmt.Errorf("block %d is malformed", n)
			}
			break
		}
		// pem.Decode skips a malformed block to find the next good one.
		if skipped := before[:len(before)-len(rest)]; bytes.Count(skipped, []byte("-----BEGIN")) > 1 {
			return nil, fmt.Errorf("block %d is malformed", n)
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("block %d is a %q, not a certificate", n, block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("block %d is malformed: %w", n, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("it holds no PEM certificate")
	}
	return certs, nil
}

func newCSR(key *ecdsa.PrivateKey) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{SignatureAlgorithm: x509.ECDSAWithSHA256}, key)
}

func matches(key *ecdsa.PrivateKey, cert *x509.Certificate) bool {
	if key == nil || cert == nil {
		return false
	}
	pub, ok := cert.PublicKey.(*ecdsa.PublicKey)
	return ok && pub.Equal(&key.PublicKey)
}

func sameCertificates(a, b []*x509.Certificate) bool {
	return slices.EqualFunc(a, b, func(x, y *x509.Certificate) bool { return x.Equal(y) })
}

func encodeAgent(a Agent) []byte {
	text, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		panic(err) // strings always encode
	}
	return append(text, '\n')
}
