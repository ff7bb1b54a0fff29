package filekey

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"time"

	"github.com/postern-dev/postern/controlplane/masterkey"
	"github.com/postern-dev/postern/proto"
)

const (
	// fresh is how long a newest key is taken for the newest. What is sealed with another one meanwhile is sealed anew.
	fresh = 5 * time.Second
	// maxKeys bounds what is remembered.
	maxKeys = 10_000
)

// Store keeps sealed keys. Its errors carry codes of package proto.
type Store interface {
	// NewestFileKey is NOT_FOUND if there is none yet.
	NewestFileKey(ctx context.Context, organization string) (generation int64, sealed []byte, err error)
	// SealedFileKey is NOT_FOUND for one that is gone.
	SealedFileKey(ctx context.Context, organization string, generation int64) ([]byte, error)
	// InsertFileKey takes the first key and the one after the newest; else it is ALREADY_EXISTS.
	InsertFileKey(ctx context.Context, organization string, generation int64, sealed []byte, now time.Time) error
}

// Service gives keys.
type Service struct {
	store Store
	keys  *masterkey.Keys
	box   *masterkey.Box

	mu     sync.Mutex
	newest map[string]newest
	known  map[place]*masterkey.DataKey
}

type newest struct {
	generation int64
	at         time.Time
}

type place struct {
	organization string
	generation   int64
}

// New returns a Service.
func New(store Store, keys *masterkey.Keys) *Service {
	return &Service{store: store, keys: keys, box: keys.Box("keys of files"), newest: map[string]newest{}, known: map[place]*masterkey.DataKey{}}
}

func about(p place) string {
	return "key " + strconv.FormatInt(p.generation, 10) + " of the files of " + p.organization
}

// Newest is the key that seals an organization's contents, at most 5 s old; the first is made when it is asked for.
func (s *Service) Newest(ctx context.Context, organization string) (generation int64, key *masterkey.DataKey, err error) {
	s.mu.Lock()
	n, ok := s.newest[organization]
	key = s.known[place{organization, n.generation}]
	s.mu.Unlock()
	if ok && key != nil && time.Since(n.at) < fresh {
		return n.generation, key, nil
	}
	generation, sealed, err := s.store.NewestFileKey(ctx, organization)
	if proto.CodeOf(err) == proto.CodeNotFound {
		if err := s.first(ctx, organization); err != nil && proto.CodeOf(err) != proto.CodeAlreadyExists {
			return 0, nil, err
		}
		generation, sealed, err = s.store.NewestFileKey(ctx, organization)
	}
	if err != nil {
		return 0, nil, err
	}
	key, err = s.open(place{organization, generation}, sealed)
	if err != nil {
		return 0, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.newest) >= maxKeys {
		clear(s.newest)
	}
	s.newest[organization] = newest{generation, time.Now()}
	return generation, key, nil
}

// first makes an organization's first key.
func (s *Service) first(ctx context.Context, organization string) error {
	key, err := s.keys.FirstDataKey("files of " + organization)
	var gone *masterkey.NoKeyError
	if errors.As(err, &gone) {
		// The installation's first master key is retired: all organizations of its time had their key by then.
		key, err = masterkey.NewDataKey(), nil
	}
	if err != nil {
		return err
	}
	return s.insert(ctx, place{organization, 1}, key)
}

func (s *Service) insert(ctx context.Context, p place, key *masterkey.DataKey) error {
	plain := key.Bytes()
	defer clear(plain)
	sealed, err := s.box.Seal(plain, about(p))
	if err != nil {
		return err
	}
	return s.store.InsertFileKey(ctx, p.organization, p.generation, sealed, time.Now())
}

// Of is the key of a generation; NOT_FOUND if it is gone.
func (s *Service) Of(ctx context.Context, organization string, generation int64) (*masterkey.DataKey, error) {
	p := place{organization, generation}
	s.mu.Lock()
	key := s.known[p]
	s.mu.Unlock()
	if key != nil {
		return key, nil
	}
	sealed, err := s.store.SealedFileKey(ctx, organization, generation)
	if proto.CodeOf(err) == proto.CodeNotFound && generation == 1 {
		// What versions without keys in the store have stored, before anything else was.
		if _, _, err := s.Newest(ctx, organization); err != nil {
			return nil, err
		}
		sealed, err = s.store.SealedFileKey(ctx, organization, generation)
	}
	if err != nil {
		return nil, err
	}
	return s.open(p, sealed)
}

func (s *Service) open(p place, sealed []byte) (*masterkey.DataKey, error) {
	s.mu.Lock()
	key := s.known[p]
	s.mu.Unlock()
	if key != nil {
		return key, nil
	}
	plain, err := s.box.Open(sealed, about(p))
	if err != nil {
		return nil, &proto.Error{Code: proto.CodeInternal, Message: about(p) + " cannot be unsealed: is master.key the one of this installation?", Err: err}
	}
	defer clear(plain)
	if key, err = masterkey.ParseDataKey(plain); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.known) >= maxKeys {
		clear(s.known)
	}
	s.known[p] = key
	return key, nil
}

// Rotate makes an organization's next key, which seals from then on. ALREADY_EXISTS means that older ones are still
// needed.
func (s *Service) Rotate(ctx context.Context, organization string) error {
	s.Forget(organization)
	generation, _, err := s.Newest(ctx, organization)
	if err != nil {
		return err
	}
	defer s.Forget(organization)
	return s.insert(ctx, place{organization, generation + 1}, masterkey.NewDataKey())
}

// Forget has the newest key of an organization, and those that may be gone, be looked up again.
func (s *Service) Forget(organization string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.newest, organization)
	for p := range s.known {
		if p.organization == organization {
			delete(s.known, p)
		}
	}
}

// Reseal seals a key, as it rests in the store, with the master key that seals at present.
func (s *Service) Reseal(organization, generation string, sealed []byte) ([]byte, error) {
	n, err := strconv.ParseInt(generation, 10, 64)
	if err != nil {
		return nil, err
	}
	return s.box.Reseal(sealed, about(place{organization, n}))
}
