package syslog

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
)

// Files are what TLS needs, in PEM. All may be empty: then the system's authorities count, and no certificate is
// shown. They are read for each connection, so that they may be replaced at any time.
type Files struct {
	// CA are the authorities that the server's certificate must be of, instead of the system's.
	CA string
	// Cert and Key are shown to a server that asks; both or neither.
	Cert, Key string
}

// Config is what they say.
func (f Files) Config() (*tls.Config, error) {
	out := &tls.Config{MinVersion: tls.VersionTLS12}
	if f.CA != "" {
		raw, err := os.ReadFile(f.CA)
		if err != nil {
			return nil, fmt.Errorf("authorities of the syslog server: %w", err)
		}
		out.RootCAs = x509.NewCertPool()
		if !out.RootCAs.AppendCertsFromPEM(raw) {
			return nil, fmt.Errorf("authorities of the syslog server: %s holds no certificate", f.CA)
		}
	}
	if f.Cert != "" || f.Key != "" {
		pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
		if err != nil {
			return nil, fmt.Errorf("certificate for the syslog server, %s and %s: %w", f.Cert, f.Key, err)
		}
		out.Certificates = []tls.Certificate{pair}
	}
	return out, nil
}
