package masterkey

import (
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Keys is the ring of DIR/master.key, and which of its keys seals.
type Keys struct {
	path string
	now  atomic.Pointer[state]

	mu   sync.Mutex      // orders changes
	gone map[string]bool // dropped, but maybe still in the file; guarded by mu
	last fs.FileInfo     // of the file when it was read last, nil for never; guarded by mu
}

// state is never changed.
type state struct {
	ring *Ring
	// active seals; shown proves the installation to other control planes.
	active, shown string
}

// Open reads the file. An error that is fs.ErrNotExist says that there is none. A ring's first key seals
// until Use says otherwise.
func Open(path string) (*Keys, error) {
	ring, err := read(path)
	if err != nil {
		return nil, fmt.Errorf("master key: %w", err)
	}
	return opened(path, ring), nil
}

// Create makes the file with a first key, whole or not at all, and never over another one: whoever is first
// among several processes makes it for all. It is on the disk when Create returns.
func Create(path string) (*Keys, error) {
	ring := NewRing()
	content, err := ring.Encode()
	if err != nil {
		return nil, err
	}
	// So that nobody sweeps away what is being made. Where directories can't be locked nobody does.
	if unlock, err := lock(filepath.Dir(path), unix.LOCK_EX); err == nil {
		defer unlock()
		_ = sweep(path)
	}
	if err := put(path, content, 0o600, os.Link); errors.Is(err, fs.ErrExist) {
		return Open(path)
	} else if err != nil {
		return nil, fmt.Errorf("master key: %w", err)
	}
	return opened(path, ring), nil
}

func opened(path string, ring *Ring) *Keys {
	k := &Keys{path: path, gone: map[string]bool{}}
	oldest := ring.keys[0].id
	k.now.Store(&state{ring, oldest, oldest})
	return k
}

// read refuses a file that others may read: who has it and the database has the CA.
func read(path string) (*Ring, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	// The group may read it: a Kubernetes secret volume gives 0440.
	if mode := info.Mode().Perm(); mode&0o027 != 0 {
		return nil, fmt.Errorf("%s has mode %04o, so others could read or change it: run chmod 600 %s", path, mode, path)
	}
	content, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err != nil {
		return nil, err
	}
	ring, err := Parse(content)
	clear(content)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return ring, nil
}

// put writes a file beside path, makes it durable, and gives it its name with place.
func put(path string, content []byte, mode fs.FileMode, place func(from, to string) error) error {
	dir := filepath.Dir(path)
	temp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(temp.Name()) }()
	_, err = temp.Write(content)
	if err := errors.Join(err, temp.Chmod(mode), temp.Sync(), temp.Close()); err != nil {
		return err
	}
	if err := place(temp.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// lock locks a directory against all who write a ring there, as flock(2) with how.
func lock(name string, how int) (unlock func(), err error) {
	dir, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), how); err != nil {
		_ = dir.Close()
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return func() { _ = dir.Close() }, nil // which ends the lock
}

// sweep removes the rings beside path that who was killed in the midst of put has left behind. The caller has
// the directory's lock, so nobody is at it.
func sweep(path string) error {
	left, err := filepath.Glob(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".*"))
	if err != nil {
		return err
	}
	for _, name := range left {
		if strings.Trim(filepath.Ext(name), ".0123456789") == "" {
			_ = os.Remove(name)
		}
	}
	return nil
}

// Sweep removes the copies of a ring beside path that a process left behind which was killed while it wrote the
// file. It does nothing while somebody writes it, and where the directory is not to be written to.
func Sweep(path string) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return
	}
	if unlock, err := lock(filepath.Dir(path), unix.LOCK_EX|unix.LOCK_NB); err == nil {
		_ = sweep(path)
		unlock()
	}
}

// change replaces the ring in a file by what f makes of it, in one step that no other process takes part in. A
// link is followed, the file keeps its mode.
func change(path string, f func(*Ring) (*Ring, error)) (*Ring, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	unlock, err := lock(filepath.Dir(path), unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer unlock()
	before, err := read(path)
	if err != nil {
		return nil, err
	}
	after, err := f(before)
	if err != nil || slices.Equal(before.IDs(), after.IDs()) {
		return after, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	content, err := after.Encode()
	if err != nil {
		return nil, err
	}
	defer clear(content)
	if err := sweep(path); err != nil {
		return nil, err
	}
	return after, put(path, content, info.Mode().Perm(), os.Rename)
}

// AddTo adds a new key to a file, without a control plane, and returns its id.
func AddTo(path string) (id string, err error) {
	_, err = change(path, func(r *Ring) (next *Ring, err error) {
		next, id, err = r.WithNew()
		return next, err
	})
	return id, err
}

// RemoveFrom takes a key out of a file, without a control plane. The last one stays.
func RemoveFrom(path, id string) error {
	_, err := change(path, func(r *Ring) (*Ring, error) {
		switch {
		case !r.Has(id):
			return nil, fmt.Errorf("%s has no key %.16q", path, id)
		case len(r.keys) == 1:
			return nil, fmt.Errorf("the key %s is the only one in %s", id, path)
		}
		return r.Without(id), nil
	})
	return err
}

// IDs are the ids of the keys, oldest first.
func (k *Keys) IDs() []string { return k.now.Load().ring.IDs() }

// Has reports whether a key is there.
func (k *Keys) Has(id string) bool { return k.now.Load().ring.Has(id) }

// Active is the id of the key that seals.
func (k *Keys) Active() string { return k.now.Load().active }

// Use says which key seals, and which one proves the installation to other control planes.
func (k *Keys) Use(active, shown string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.now.Store(&state{k.now.Load().ring, active, shown})
}

// Refresh reads the file again, to which keys may have been added. What the file lacks and this process has
// is written back: it is needed until Drop. When the file cannot be read or written, the process goes on with what it has.
func (k *Keys) Refresh() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	info, err := os.Stat(k.path)
	if err == nil && k.last != nil && os.SameFile(info, k.last) && info.ModTime().Equal(k.last.ModTime()) && info.Size() == k.last.Size() {
		return nil
	}
	k.last = nil
	var ring *Ring
	if err == nil {
		ring, err = read(k.path)
	}
	now := k.now.Load()
	if err == nil {
		ring, err = now.ring.union(k.withoutGoneLocked(ring))
	}
	if err == nil {
		k.now.Store(&state{ring, now.active, now.shown}) // even where the file cannot be written
		// Somebody may have changed the file since: what change returns is what is in it.
		ring, err = change(k.path, func(r *Ring) (*Ring, error) {
			r, err := r.union(ring)
			if err != nil {
				return nil, err
			}
			return k.withoutGoneLocked(r), nil
		})
	}
	if err == nil {
		k.now.Store(&state{ring, now.active, now.shown})
		k.last = info // of before it was read: a change meanwhile is seen the next time
	}
	if err != nil {
		return fmt.Errorf("master key: %w", err)
	}
	return nil
}

// withoutGoneLocked may be a ring without keys.
func (k *Keys) withoutGoneLocked(r *Ring) *Ring {
	return &Ring{keys: slices.DeleteFunc(slices.Clone(r.keys), func(one ringKey) bool { return k.gone[one.id] })}
}

// changeLocked changes the file, and what is in use only when that is on the disk.
func (k *Keys) changeLocked(f func(*Ring) (*Ring, error)) error {
	now := k.now.Load()
	ring, err := change(k.path, func(r *Ring) (*Ring, error) {
		r, err := r.union(now.ring)
		if err != nil {
			return nil, err
		}
		return f(r)
	})
	if err != nil {
		return err
	}
	k.now.Store(&state{k.withoutGoneLocked(ring), now.active, now.shown})
	return nil
}

// New adds a new key and returns its id. It is on the disk then, and seals nothing yet.
func (k *Keys) New() (id string, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	err = k.changeLocked(func(r *Ring) (next *Ring, err error) {
		next, id, err = r.WithNew()
		return next, err
	})
	if err != nil {
		return "", fmt.Errorf("master key: %w", err)
	}
	return id, nil
}

// Add adds a key that another control plane gave, which must have that id.
func (k *Keys) Add(id string, key []byte) error {
	if len(key) != Size {
		return errors.New("a master key of another size")
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	err := k.changeLocked(func(r *Ring) (*Ring, error) {
		next, got, err := r.With(Key(key))
		if err == nil && got != id {
			err = errors.New("the key is not the one of that id")
		}
		return next, err
	})
	if err != nil {
		return fmt.Errorf("master key %s: %w", id, err)
	}
	return nil
}

// Give returns a key for another control plane; nil if it is not there, or is the first, which each has by itself.
func (k *Keys) Give(id string) []byte {
	key, ok := k.now.Load().ring.find(id)
	if !ok || id == FirstID {
		return nil
	}
	return key[:]
}

// Drop takes a key out that nothing is sealed with, for good: out of the file first. This process does without it
// even where the file cannot be written, which the error says.
func (k *Keys) Drop(id string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := k.now.Load()
	if now.active == id {
		return fmt.Errorf("master key %s seals", id)
	}
	k.gone[id] = true
	if err := k.changeLocked(func(r *Ring) (*Ring, error) { return r.Without(id), nil }); err != nil {
		k.now.Store(&state{now.ring.Without(id), now.active, now.shown})
		return fmt.Errorf("master key %s is retired, but still in the file: %w", id, err)
	}
	return nil
}

// Peer is the key that proves this installation to other control planes, and what they may prove it with: one
// for each master key.
func (k *Keys) Peer() (own ed25519.PrivateKey, accepted []ed25519.PublicKey, err error) {
	s := k.now.Load()
	for _, one := range s.ring.keys {
		seed, err := hkdf.Key(sha256.New, one.key[:], nil, "postern peers", ed25519.SeedSize)
		if err != nil {
			return nil, nil, err
		}
		key := ed25519.NewKeyFromSeed(seed)
		accepted = append(accepted, key.Public().(ed25519.PublicKey))
		if one.id == s.shown || own == nil {
			own = key
		}
	}
	return own, accepted, nil
}
