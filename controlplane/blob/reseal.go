package blob

import (
	"context"
	"errors"
	"time"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto/filechunk"
)

const (
	// resealStep is how many objects one step seals anew, at most; each has up to 1 MiB.
	resealStep = 64
	// resealAtOnce is how many of them are in memory at a time.
	resealAtOnce = 4
)

// Reseal takes one step of sealing anew what an organization's older keys seal: at most 64 objects, 4 of them in
// memory at a time. It returns how many it looked at; zero: nothing is left but what is damaged. It may be stopped at
// any point; what it has written by then and not noted is removed by Collect. Readers go on: an object that was replaced
// meanwhile is looked for again.
func (s *Store) Reseal(ctx context.Context, organization string) (int, error) {
	var err error
	for range keyAttempts {
		var n int
		if n, err = s.reseal(ctx, organization); !errors.Is(err, filetree.ErrKeyReplaced) {
			return n, err
		}
		s.cfg.Keys.Forget(organization)
	}
	return 0, err
}

func (s *Store) reseal(ctx context.Context, organization string) (int, error) {
	generation, _, err := s.cfg.Keys.Newest(ctx, organization)
	if err != nil {
		return 0, err
	}
	stale, err := s.cfg.Index.StaleObjects(ctx, organization, generation, resealStep)
	if err != nil || len(stale) == 0 {
		return 0, err
	}
	hashes := make([]filetree.Hash, len(stale))
	for i, o := range stale {
		hashes[i] = o.Hash
	}
	fresh, err := s.upload(ctx, organization, hashes, resealAtOnce, func(ctx context.Context, i int) ([]byte, error) {
		chunk, err := s.read(ctx, organization, stale[i], make([]byte, min(stale[i].Size, filechunk.Size)+overhead+1), true)
		if errors.Is(err, errLost) {
			_ = s.damaged(ctx, organization, stale[i], err) // which notes it, unless the object is another one by now
			return nil, nil
		}
		return chunk, err
	})
	if err != nil {
		return 0, err
	}
	var was, by []filetree.Object
	for i, o := range fresh {
		if o.Size > 0 {
			was, by = append(was, stale[i]), append(by, o)
		}
	}
	keep := s.cfg.Replaced
	if keep == 0 {
		keep = DefaultGrace
	}
	now := time.Now()
	return len(stale), s.cfg.Index.ReplaceObjects(ctx, organization, was, by, now, now.Add(keep))
}
