package main

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/postern-dev/postern/agentd/atomicfile"
	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/secret"
	"github.com/postern-dev/postern/agentd/sqlsession"
)

const (
	// maskKeyFile is the host's own key for masks, in its state: 32 random
	// bytes, 0600, made when a policy needs one first.
	maskKeyFile = "mask.key"
	maskKeySize = 32
	// minMaskKey is the shortest key that mask_key may name, in bytes.
	minMaskKey = 16
)

// maskKey is the key of masks for this host's organization: of the host's own
// key, or the one that mask_key names, so that hosts which share one mask alike,
// and organizations never do. nil where no source masks anything.
func maskKey(ctx context.Context, c *config.Config, env *secret.Environment, state, organization string) ([]byte, error) {
	needed := false
	for _, s := range c.Sources {
		needed = needed || len(s.Policy.Masks) > 0
	}
	if !needed {
		return nil, nil
	}
	key, err := hostMaskKey(ctx, c, env, filepath.Join(state, maskKeyFile))
	if err != nil {
		return nil, err
	}
	defer clear(key)
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte("postern mask 1\x00" + organization))
	return mac.Sum(nil), nil
}

func hostMaskKey(ctx context.Context, c *config.Config, env *secret.Environment, file string) ([]byte, error) {
	if !c.MaskKey.IsZero() {
		value, err := c.MaskKey.Load(ctx, env)
		if err != nil {
			return nil, fmt.Errorf("mask_key: %w", err)
		}
		key := []byte(value.Reveal())
		if len(key) < minMaskKey {
			return nil, fmt.Errorf("mask_key: it has %d bytes, fewer than %d: make one with openssl rand -hex 32", len(key), minMaskKey)
		}
		return key, nil
	}
	key, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		key = make([]byte, maskKeySize)
		rand.Read(key) //nolint:errcheck // it never fails
		if err := (atomicfile.FS{}).Write(file, key, 0o600); err != nil {
			return nil, fmt.Errorf("make the key of masks: %w", err)
		}
	case err != nil:
		return nil, fmt.Errorf("the key of masks: %w", err)
	case len(key) != maskKeySize:
		return nil, fmt.Errorf("the key of masks %s has %d bytes, not %d: bring it back from a backup, or remove it, and all hashes change", file, len(key), maskKeySize)
	}
	return key, nil
}

// setSources gives a configuration's sources to the SQL sessions and to whatever
// masks texts. After an error the old ones are in force.
func (d *Daemon) setSources(c *config.Config) error {
	key, err := maskKey(context.Background(), c, d.secrets, d.state, d.identity.Agent().Organization)
	if err != nil {
		return err
	}
	sources := mapSources(c, d.secrets, d.vault, key)
	texts := map[string]*sqlsession.Texts{}
	for _, s := range sources {
		t, err := sqlsession.NewTexts(s.Guard)
		if err != nil {
			return fmt.Errorf("source %s: policy.mask: %w", s.Name, err)
		}
		texts[s.Name] = t
	}
	d.texts.Store(&texts)
	d.sessions.SetSources(sources)
	return nil
}

// maskText takes out of a text about a source what its policy's patterns match.
func (d *Daemon) maskText(source, text string) string {
	if texts := d.texts.Load(); texts != nil {
		return (*texts)[source].String(text)
	}
	return text
}
