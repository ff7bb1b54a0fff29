package kernel

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/postern-dev/postern/agentd/atomicfile"
	"github.com/postern-dev/postern/agentd/kernel/internal/shim"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// secretsFile is in a kernel's directory: what it has of secrets, sealed.
	secretsFile = "secrets.sealed"
	// secretsKeySize is of Config.SecretsKeyFile, in bytes: AES-256.
	secretsKeySize = 32
	// maxOld and maxOldBytes bound the values that a kernel had and that are kept out of
	// its outputs still; the oldest give way.
	maxOld, maxOldBytes = 256, 512 << 10
	// refreshPause is between two looks at the host's own secrets.
	refreshPause = time.Minute
	// refreshTime bounds one.
	refreshTime = 30 * time.Second
)

// Secret is a variable of a kernel's environment; FromHost: the host read it itself.
type Secret = shim.Secret

// PutSecrets says all secrets that a kernel is to have from now on. They are durable,
// sealed, before the kernel gets any; the kernel has them when it returns, unless the
// result says waiting or later. unchanged: it had just these.
func (m *Manager) PutSecrets(ctx context.Context, id string, all []Secret) (waiting, later, unchanged bool, err error) {
	k, err := m.find(ctx, id)
	if err != nil {
		return false, false, false, err
	}
	k.secrets.Lock()
	defer k.secrets.Unlock()
	return m.putSecrets(ctx, k, all)
}

// putSecrets: the caller has k.secrets.
func (m *Manager) putSecrets(ctx context.Context, k *kernel, all []Secret) (waiting, later, unchanged bool, err error) {
	m.mu.Lock()
	id, name, gone := k.spec.ID, k.spec.Name, k.stopping
	module := ""
	for _, b := range k.spec.Sandbox.Binds {
		if b.Target == moduleInside {
			module = b.Source
		}
	}
	m.mu.Unlock()
	if gone {
		return false, false, false, proto.Errorf(proto.CodeNotFound, "kernel %s is being stopped", id)
	}
	if len(all) > 0 {
		if module == "" {
			return false, false, false, proto.Errorf(proto.CodeInvalid, "secrets are for kernels that run ipykernel: kernel %s is of spec %s", id, name)
		}
		if _, err := os.Stat(filepath.Join(module, "postern", "_secrets.py")); err != nil {
			return false, false, false, proto.Errorf(proto.CodeUnavailable, "kernel %s was started by an agentd without secrets: stop it and start another", id)
		}
	}
	was, err := m.readSecrets(k)
	if err != nil {
		return false, false, false, err
	}
	slices.SortFunc(all, func(a, b Secret) int { return bytes.Compare([]byte(a.Name), []byte(b.Name)) })
	if slices.EqualFunc(was.Current, all, sameSecret) {
		return false, false, true, nil
	}
	now := shim.Secrets{Current: all}
	size := 0
	for _, old := range slices.Concat(was.Current, was.Old) {
		same := func(s Secret) bool { return bytes.Equal(s.Value, old.Value) }
		if slices.ContainsFunc(all, same) || slices.ContainsFunc(now.Old, same) {
			continue
		}
		if size += len(old.Value); len(now.Old) >= maxOld || size > maxOldBytes {
			break
		}
		now.Old = append(now.Old, old)
	}
	if err := m.writeSecrets(k, now); err != nil {
		return false, false, false, err
	}
	put, err := k.agent.SetSecrets(ctx, now)
	if err != nil {
		// The next shim, or the next try, has them from the file.
		m.logger.Warn("secrets not with the kernel's shim yet", "kernel", id, "err", err)
		m.owe(k)
		return true, false, false, nil
	}
	return put.Waiting, put.Later, false, nil
}

func sameSecret(a, b Secret) bool {
	return a.Name == b.Name && a.FromHost == b.FromHost && bytes.Equal(a.Value, b.Value)
}

// owe has refreshSecrets give the shim of a kernel its secrets again.
func (m *Manager) owe(k *kernel) {
	m.mu.Lock()
	defer m.mu.Unlock()
	k.owed = true
}

// readSecrets reads what a kernel has of secrets; none if there is no file.
func (m *Manager) readSecrets(k *kernel) (all shim.Secrets, err error) {
	path := filepath.Join(k.dir, secretsFile)
	sealed, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return all, nil
	}
	if err != nil {
		return all, fmt.Errorf("a kernel's secrets: %w", err)
	}
	box, err := m.secretsBox(false)
	if err != nil {
		return all, err
	}
	if len(sealed) < box.NonceSize() {
		return all, fmt.Errorf("a kernel's secrets: %s is cut short: stop the kernel", path)
	}
	plain, err := box.Open(nil, sealed[:box.NonceSize()], sealed[box.NonceSize():], secretsAbout(k))
	if err != nil {
		return all, fmt.Errorf("a kernel's secrets: %s was altered, or is of another %s: stop the kernel, or bring the key back", path, m.cfg.SecretsKeyFile)
	}
	defer clear(plain)
	if err := json.Unmarshal(plain, &all); err != nil {
		return all, fmt.Errorf("a kernel's secrets: %s can't be read", path)
	}
	return all, nil
}

func (m *Manager) writeSecrets(k *kernel, all shim.Secrets) error {
	plain, err := json.Marshal(all)
	if err != nil {
		return err
	}
	defer clear(plain)
	box, err := m.secretsBox(true)
	if err != nil {
		return err
	}
	nonce := make([]byte, box.NonceSize())
	rand.Read(nonce) //nolint:errcheck // it never fails
	var files atomicfile.FS
	if err := files.Write(filepath.Join(k.dir, secretsFile), box.Seal(nonce, nonce, plain, secretsAbout(k)), 0o600); err != nil {
		return fmt.Errorf("a kernel's secrets: %w", err)
	}
	return nil
}

// secretsAbout binds a file to its directory.
func secretsAbout(k *kernel) []byte {
	return []byte("postern kernel secrets 1\x00" + filepath.Base(k.dir))
}

// secretsBox is what seals; the key is made when it is needed first.
func (m *Manager) secretsBox(create bool) (cipher.AEAD, error) {
	if m.cfg.SecretsKeyFile == "" {
		return nil, proto.Errorf(proto.CodeUnavailable, "this host keeps no secrets of kernels")
	}
	m.secretsKey.Lock()
	defer m.secretsKey.Unlock()
	key, err := os.ReadFile(m.cfg.SecretsKeyFile)
	if errors.Is(err, fs.ErrNotExist) && create {
		key = make([]byte, secretsKeySize)
		rand.Read(key) //nolint:errcheck // it never fails
		err = (atomicfile.FS{}).Write(m.cfg.SecretsKeyFile, key, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("the key of kernels' secrets: %w", err)
	}
	defer clear(key)
	if len(key) != secretsKeySize {
		return nil, fmt.Errorf("the key of kernels' secrets %s has %d bytes, not %d: bring it back from a backup", m.cfg.SecretsKeyFile, len(key), secretsKeySize)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// keepSecrets keeps kernels' secrets up to date: what the host reads itself is read again,
// what the policy does not allow any more is taken back, and shims that could not be
// reached are told.
func (m *Manager) keepSecrets() {
	tick := time.NewTicker(refreshPause)
	defer tick.Stop()
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-m.revise:
		case <-tick.C:
		}
		m.refreshSecrets()
	}
}

// refreshSecrets does it once, for all kernels.
func (m *Manager) refreshSecrets() {
	m.mu.Lock()
	settings := m.settings
	var all []*kernel
	for _, k := range m.kernels {
		all = append(all, k)
	}
	m.mu.Unlock()
	read := map[string][]byte{} // one look for all kernels
	for _, k := range all {
		select {
		case <-k.ready:
		default:
			continue // it is being started
		}
		if k.failed != nil || m.ctx.Err() != nil {
			continue
		}
		m.refreshKernel(k, settings, read)
	}
	for _, value := range read {
		clear(value)
	}
}

func (m *Manager) refreshKernel(k *kernel, settings Settings, read map[string][]byte) {
	k.secrets.Lock()
	defer k.secrets.Unlock()
	was, err := m.readSecrets(k)
	if err != nil {
		m.logger.Error("secrets of a kernel not looked at", "dir", k.dir, "err", err)
		return
	}
	var now []Secret
	for _, s := range was.Current {
		if settings.SecretAllowed != nil && settings.SecretAllowed(s.Name, s.FromHost) != "" {
			m.logger.Info("a secret is taken from a kernel: the policy has changed", "dir", k.dir, "secret", s.Name)
			continue
		}
		if s.FromHost {
			s.Value = m.readAgain(k, s, read)
		}
		now = append(now, s)
	}
	ctx, cancel := context.WithTimeout(m.ctx, refreshTime)
	defer cancel()
	m.mu.Lock()
	owed := k.owed
	m.mu.Unlock()
	waiting, _, unchanged, err := m.putSecrets(ctx, k, now)
	if unchanged && owed {
		if _, err = k.agent.SetSecrets(ctx, was); err == nil {
			m.mu.Lock()
			k.owed = false
			m.mu.Unlock()
		}
	}
	if err != nil && m.ctx.Err() == nil {
		m.logger.Warn("secrets of a kernel not brought up to date", "dir", k.dir, "err", err)
	}
	if !unchanged && err == nil && m.cfg.SecretsChanged != nil {
		m.cfg.SecretsChanged(m.known(k), names(now), waiting)
	}
}

// readAgain reads one of the host's own; what can't be read at present stays as it was.
func (m *Manager) readAgain(k *kernel, s Secret, read map[string][]byte) []byte {
	value, known := read[s.Name]
	if !known && m.cfg.ReadSecret != nil {
		ctx, cancel := context.WithTimeout(m.ctx, refreshTime)
		defer cancel()
		var err error
		if value, err = m.cfg.ReadSecret(ctx, s.Name); err != nil {
			if m.ctx.Err() == nil {
				m.logger.Warn("a secret can't be read at present: kernels keep the value that they have", "secret", s.Name, "dir", k.dir, "err", err)
			}
			value = nil
		}
		read[s.Name] = value
	}
	if value == nil {
		return s.Value
	}
	return slices.Clone(value)
}

func names(all []Secret) []string {
	var out []string
	for _, s := range all {
		out = append(out, s.Name)
	}
	return out
}

// secretsOf are a kernel's for a new shim.
func (m *Manager) secretsOf(k *kernel) (shim.Secrets, error) {
	// Without them what the kernel prints would go out as it is.
	return m.readSecrets(k)
}

// secretsLock orders what is done to a kernel's secrets.
type secretsLock struct{ sync.Mutex }

// SecretsChanged is told of a kernel whose secrets the host itself changed.
type SecretsChanged func(k *posternv1.Kernel, names []string, waiting bool)
