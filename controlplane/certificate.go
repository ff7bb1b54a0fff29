package main

import (
	"crypto/tls"
	"fmt"
	"os"
	"sync"
	"time"
)

// certificateFiles is a server certificate that is read again when its file
// changes, so that it can be renewed with no restart.
type certificateFiles struct {
	cert, key string

	mu       sync.Mutex
	current  *tls.Certificate
	modified time.Time
	checked  time.Time
}

// certificateCheck is how often the files are looked at, at most.
const certificateCheck = 10 * time.Second

func newCertificateFiles(cert, key string) (*certificateFiles, error) {
	c := &certificateFiles{cert: cert, key: key}
	if _, err := c.get(nil); err != nil {
		return nil, err
	}
	return c, nil
}

// get is for tls.Config.GetCertificate. A new pair that cannot be read yet leaves
// the old one in use.
func (c *certificateFiles) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current != nil && time.Since(c.checked) < certificateCheck {
		return c.current, nil
	}
	c.checked = time.Now()
	info, err := os.Stat(c.cert)
	if err == nil && c.current != nil && info.ModTime().Equal(c.modified) {
		return c.current, nil
	}
	var pair tls.Certificate
	if err == nil {
		pair, err = tls.LoadX509KeyPair(c.cert, c.key)
	}
	if err != nil {
		if c.current != nil {
			return c.current, nil
		}
		return nil, fmt.Errorf("--tls-cert %s, --tls-key %s: %w", c.cert, c.key, err)
	}
	c.current, c.modified = &pair, info.ModTime()
	return c.current, nil
}
