package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/postern-dev/postern/agentd/atomicfile"
	"github.com/postern-dev/postern/agentd/checkpoint/pagestore"
)

// KeyInfo is a key of the host for checkpoints and what it still seals.
type KeyInfo = pagestore.KeyInfo

// ErrNoStore is returned by OpenKeys when the host never made a checkpoint, so that there
// is no key.
var ErrNoStore = errors.New("this host has no checkpoints and no key for them yet: agentd makes both when it starts with kernels enabled")

// maxKeyFile bounds the file of keys in bytes: a ring with the hash keys of a hundred
// thousand organizations.
const maxKeyFile = 16 << 20

// keyFile is STATE/checkpoint.key, 0600: the ring that everything at rest is sealed with.
type keyFile struct{ path string }

// load reads the ring, or makes one.
func (f keyFile) load() (*pagestore.Ring, error) {
	b, made, err := f.read()
	if errors.Is(err, fs.ErrNotExist) {
		ring, err := pagestore.NewRing()
		if err == nil {
			err = f.save(ring)
		}
		if err != nil {
			return nil, fmt.Errorf("checkpoint key: %w", err)
		}
		return ring, nil
	}
	if err != nil {
		return nil, fmt.Errorf("checkpoint key: %w", err)
	}
	ring, err := pagestore.ParseRing(b, made)
	if err != nil {
		return nil, fmt.Errorf("checkpoint key %s: %w: put the right file back, or delete it with STATE/checkpoints", f.path, err)
	}
	return ring, nil
}

// read returns the file and when it was written.
func (f keyFile) read() (b []byte, made time.Time, err error) {
	info, err := os.Stat(f.path)
	if err != nil {
		return nil, made, err
	}
	if info.Size() > maxKeyFile {
		return nil, made, fmt.Errorf("%s has %d bytes, the bound is %d", f.path, info.Size(), maxKeyFile)
	}
	b, err = os.ReadFile(f.path)
	return b, info.ModTime(), err
}

// save replaces the file, durably.
func (f keyFile) save(r *pagestore.Ring) error {
	b, err := r.Encode()
	if err != nil {
		return err
	}
	var files atomicfile.FS
	return files.Write(f.path, b, 0o600)
}

// Keys are the host's keys for checkpoints while no agentd has the store open. Close it.
type Keys struct{ store *pagestore.Store }

// OpenKeys opens the store in this state directory of agentd for Rotate and List.
// ErrNoStore says that there is none; an error that wraps [pagestore.ErrInUse] that an
// agentd has it open.
func OpenKeys(c Config) (*Keys, error) {
	file := keyFile{path: filepath.Join(c.State, "checkpoint.key")}
	for _, path := range []string{file.path, filepath.Join(c.State, "checkpoints")} {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			return nil, ErrNoStore
		} else if err != nil {
			return nil, fmt.Errorf("checkpoint key: %w", err)
		}
	}
	// The store is locked before the ring is read, so that no agentd replaces it meanwhile.
	store, err := pagestore.Open(pagestore.Options{Dir: filepath.Join(c.State, "checkpoints"), LoadRing: file.load, SaveRing: file.save, Logger: c.Logger})
	if err != nil {
		return nil, err
	}
	return &Keys{store}, nil
}

// Rotate is [Engine.RotateKey]; what the older keys seal is sealed anew once agentd runs.
func (k *Keys) Rotate() (KeyInfo, error) { return k.store.RotateKey() }

// List is [Engine.Keys].
func (k *Keys) List(ctx context.Context) ([]KeyInfo, error) { return k.store.Keys(ctx) }

// Close gives the store back.
func (k *Keys) Close() error { return k.store.Close() }

// RotateKey makes a new key, durably, which seals checkpoints from now on. What the older
// ones seal stays readable, and is sealed anew in the background; a key that nothing needs
// any more is dropped.
func (e *Engine) RotateKey() (KeyInfo, error) {
	k, err := e.store.RotateKey()
	if err != nil {
		return k, err
	}
	e.cfg.Logger.Info("checkpoint key rotated", "key", k.ID)
	e.collectSoon()
	return k, nil
}

// Keys lists the host's keys, oldest first, with what each seals.
func (e *Engine) Keys(ctx context.Context) ([]KeyInfo, error) { return e.store.Keys(ctx) }

// reseal seals anew what older keys seal, in bounded steps.
func (e *Engine) reseal() {
	for {
		s, err := e.store.Reseal(e.ctx, collectBudget)
		if err != nil {
			if e.ctx.Err() == nil {
				e.cfg.Logger.Error("checkpoints are not sealed with the new key yet", "err", err)
			}
			return
		}
		for _, id := range s.Dropped {
			e.cfg.Logger.Info("old checkpoint key dropped", "key", id)
		}
		if s.Done {
			if s.Stuck > 0 {
				e.cfg.Logger.Warn("an old checkpoint key stays: what is damaged can't be sealed anew", "count", s.Stuck, "err", s.Why)
			}
			return
		}
		select {
		case <-e.ctx.Done():
			return
		case <-time.After(collectPause):
		}
	}
}
