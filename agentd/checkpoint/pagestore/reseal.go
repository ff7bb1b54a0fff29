package pagestore

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"time"

	"github.com/postern-dev/postern/proto"
)

// KeyInfo is a key of the store's ring and what it still seals.
type KeyInfo struct {
	ID     string    // 16 hexadecimal digits, which tell nothing of the key
	Made   time.Time // UTC
	Newest bool      // it seals what is stored from now on
	// Packs, their living Chunks and the packs' Bytes on disk; Checkpoints whose
	// description or list of files it seals.
	Packs, Chunks, Checkpoints int
	Bytes                      int64
}

// ResealStats say what a step of Reseal did.
type ResealStats struct {
	Done        bool     // nothing is left to do until the next rotation
	Packs       int      // sealed anew
	Checkpoints int      // whose descriptions and lists were sealed anew
	IO          int64    // bytes read and written
	Dropped     []string // ids of keys that nothing needed any more
	// Stuck are packs and checkpoints that can't be sealed anew since they are damaged;
	// keys stay for their sake until they are deleted. Why says so of the first.
	Stuck int
	Why   error
}

// RotateKey adds a new key to the ring, durably, and seals with it from now on. What the
// older ones seal stays readable; Reseal moves it to the new one.
func (s *Store) RotateKey() (KeyInfo, error) {
	if err := s.enter(); err != nil {
		return KeyInfo{}, err
	}
	defer s.busy.Done()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.opts.SaveRing == nil {
		return KeyInfo{}, errors.New("rotate the checkpoint key: the store was opened without a ring of keys")
	}
	var names []string
	for name := range s.orgs {
		names = append(names, name)
	}
	next, err := s.ring.rotated(names)
	if err != nil {
		return KeyInfo{}, proto.Errorf(proto.CodeUnavailable, "rotate the checkpoint key: %s", err)
	}
	if err := s.useRingLocked(next); err != nil {
		return KeyInfo{}, fmt.Errorf("rotate the checkpoint key: %w", err)
	}
	s.rotations++
	k := next.newest()
	return KeyInfo{ID: k.id.String(), Made: k.made, Newest: true}, nil
}

// useRingLocked saves a ring and goes by it; after an error by the one before. Everything
// is derived first, so that nothing can fail once it is saved.
func (s *Store) useRingLocked(next *Ring) error {
	sets := map[*orgStore]*keyset{}
	for _, o := range s.orgs {
		set, err := next.derive(o.name)
		if err != nil {
			return err
		}
		sets[o] = set
	}
	if err := s.opts.SaveRing(next); err != nil {
		s.unsure = err
		return err
	}
	s.ring, s.unsure = next, nil
	for o, set := range sets {
		o.set.Store(set)
	}
	return nil
}

// Keys lists the ring's keys, oldest first, with what each seals. It opens every pack.
func (s *Store) Keys(ctx context.Context) ([]KeyInfo, error) {
	if err := s.enter(); err != nil {
		return nil, err
	}
	defer s.busy.Done()
	s.mu.Lock()
	ring := s.ring
	s.mu.Unlock()
	at := map[keyID]*KeyInfo{}
	list := make([]KeyInfo, len(ring.keys))
	for i, k := range ring.keys {
		list[i] = KeyInfo{ID: k.id.String(), Made: k.made, Newest: i == len(ring.keys)-1}
		at[k.id] = &list[i]
	}
	for _, o := range s.organizations() {
		if err := o.countKeys(ctx, at); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// countKeys adds an organization's packs and checkpoints to their keys. What is not of any
// of these keys, and damaged packs' chunks, are left out.
func (o *orgStore) countKeys(ctx context.Context, at map[keyID]*KeyInfo) error {
	o.mu.Lock()
	var packs []packID
	for id, info := range o.packs {
		if k := at[info.key]; k != nil && !info.pending {
			k.Packs++
			k.Bytes += info.size
			packs = append(packs, id)
		}
	}
	for _, p := range o.points {
		if p.storing {
			continue
		}
		if k := at[p.metaKey]; k != nil {
			k.Checkpoints++
		}
		if k := at[p.filesKey]; k != nil && p.filesKey != p.metaKey {
			k.Checkpoints++
		}
	}
	o.mu.Unlock()
	for _, id := range packs {
		if err := ctx.Err(); err != nil {
			return err
		}
		p, err := o.openPack(id)
		if errors.Is(err, ErrDamaged) {
			continue // or deleted since
		} else if err != nil {
			return err
		}
		if k := at[p.key]; k != nil {
			for _, seg := range p.segs {
				k.Chunks += bits.OnesCount64(seg.live)
			}
		}
		p.close()
	}
	return nil
}

// Reseal moves what older keys seal to the newest, and drops the keys that nothing needs
// any more. A step reads and writes about budget bytes and at most one pack or list of
// files more; call it again until Done. Everything else goes on meanwhile, and a crash
// anywhere leaves each file sealed with one key or the other, both of which are kept.
func (s *Store) Reseal(ctx context.Context, budget int64) (ResealStats, error) {
	var stats ResealStats
	if err := s.enter(); err != nil {
		return stats, err
	}
	defer s.busy.Done()
	s.mu.Lock()
	single := len(s.ring.keys) == 1
	s.mu.Unlock()
	if single {
		stats.Done = true
		return stats, nil
	}
	for _, o := range s.organizations() {
		if err := o.reseal(ctx, budget, &stats); err != nil {
			if ctx.Err() != nil {
				return stats, ctx.Err()
			}
			code := proto.CodeInternal
			if isFull(err) {
				code = proto.CodeStorageFull
			}
			return stats, &proto.Error{Code: code, Message: fmt.Sprintf("seal checkpoints of %s with the new key: %s", o.name, err), Err: err}
		}
		if stats.IO >= budget {
			return stats, nil
		}
	}
	left, err := s.dropKeys(&stats)
	if err != nil {
		return stats, fmt.Errorf("drop an old checkpoint key: %w", err)
	}
	// What is left then belongs to Puts under way, or is stuck.
	stats.Done = !left || stats.Stuck > 0
	return stats, nil
}

// reseal does one organization's, until the budget is used up.
func (o *orgStore) reseal(ctx context.Context, budget int64, stats *ResealStats) error {
	packs, points := o.oldFiles()
	for _, id := range packs {
		if stats.IO >= budget {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := o.resealPack(ctx, id, stats); err != nil {
			return err
		}
	}
	for _, id := range points {
		if stats.IO >= budget {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := o.resealPoint(id, stats); err != nil {
			return err
		}
	}
	return nil
}

// oldFiles lists what the newest key does not seal, oldest first.
func (o *orgStore) oldFiles() (packs []packID, points []ID) {
	newest := o.keyset().newest.id
	o.mu.Lock()
	defer o.mu.Unlock()
	for id, info := range o.packs {
		if !info.pending && info.key != newest {
			packs = append(packs, id)
		}
	}
	for id, p := range o.points {
		if !p.storing && (p.metaKey != newest || p.filesKey != newest) {
			points = append(points, id)
		}
	}
	slices.SortFunc(packs, func(a, b packID) int { return slices.Compare(a[:], b[:]) })
	slices.Sort(points)
	return packs, points
}

func (s *ResealStats) stuck(err error) {
	s.Stuck++
	if s.Why == nil {
		s.Why = err
	}
}

// resealPack writes a pack again under its name, with all its chunks as they are packed.
// Those who have the old file open keep it.
func (o *orgStore) resealPack(ctx context.Context, id packID, stats *ResealStats) error {
	o.collecting.Lock()
	defer o.collecting.Unlock()
	o.mu.Lock()
	info := o.packs[id]
	o.mu.Unlock()
	if info == nil {
		return nil // deleted meanwhile
	}
	p, err := o.openPack(id)
	if errors.Is(err, ErrDamaged) {
		stats.stuck(err)
		return nil
	} else if err != nil {
		return err
	}
	defer p.close()
	hashes, err := p.readHashes()
	if errors.Is(err, ErrDamaged) {
		stats.stuck(err)
		return nil
	} else if err != nil {
		return err
	}
	w, err := o.newPack(id)
	if err != nil {
		return err
	}
	if err := copySegments(ctx, w, p, hashes); err != nil {
		w.abort()
		if errors.Is(err, ErrDamaged) {
			stats.stuck(err)
			return nil
		}
		return err
	}
	size, err := w.finish()
	if err != nil {
		return err
	}
	// The directory is synced before the pack counts as the new key's: an old key is
	// dropped only when no file that it seals can come back.
	if err := o.fs.syncDir(o.packDir()); err != nil {
		return err
	}
	o.mu.Lock()
	info.key = w.key
	before := info.size
	info.size = size
	o.mu.Unlock()
	o.store.used.Add(size - before)
	stats.Packs++
	stats.IO += 2 * size
	return nil
}

// copySegments seals p's segments for w, without unpacking them.
func copySegments(ctx context.Context, w *packWriter, p *pack, hashes []chunkHash) error {
	buf, sealed := make([]byte, segmentSize+sealedMore), make([]byte, 0, segmentSize+sealedMore)
	for n, seg := range p.segs {
		if err := ctx.Err(); err != nil {
			return err
		}
		sealed = sealed[:0]
		if seg.codec != codecGone {
			b := buf[:seg.stored]
			if err := readAt(p.f, b, seg.offset); err != nil {
				return err
			}
			body, err := p.aead.Open(b[:0], counterNonce(uint64(n)), b, []byte{byte(seg.codec)})
			if err != nil {
				return damaged("pack %s: segment %d does not authenticate", p.id, n)
			}
			sealed = w.aead.Seal(sealed, counterNonce(uint64(n)), body, []byte{byte(seg.codec)})
		}
		first := n * segmentChunks
		if err := w.add(seg.codec, sealed, hashes[first:first+int(seg.chunks)]); err != nil {
			return err
		}
		if w.segs[n].live != seg.live {
			return damaged("pack %s: segment %d: its chunks are not those that its table has", p.id, n)
		}
	}
	return nil
}

// resealPoint writes a checkpoint's list of files and description again.
func (o *orgStore) resealPoint(id ID, stats *ResealStats) error {
	o.collecting.Lock() // as all that change descriptions
	defer o.collecting.Unlock()
	_, rec, done, err := o.store.read(id)
	switch {
	case proto.CodeOf(err) == proto.CodeNotFound:
		return nil // deleted meanwhile
	case errors.Is(err, ErrDamaged):
		stats.stuck(err)
		return nil
	case err != nil:
		return err
	}
	defer done()
	plain, err := o.readFiles(o.keyset(), &rec) // nobody seals it anew but who has collecting
	if errors.Is(err, ErrDamaged) {
		stats.stuck(inCheckpoint("seal", id, err))
		return nil
	} else if err != nil {
		return err
	}
	k := o.keyset().newest
	files := k.seal(filesMagic, o.place(id)+"\x00"+rec.Files, plain)
	grown := int64(len(files)) - o.fileSize(o.filesPath(id))
	rec.FileSize = int64(len(files))
	meta, err := o.sealRecord(k, &rec)
	if err != nil {
		return err
	}
	grown += int64(len(meta)) - o.fileSize(o.metaPath(id))
	if err := writeWhole(o.fs, o.pointDir(), string(id)+fileSuffix, files); err != nil {
		return err
	}
	if err := writeWhole(o.fs, o.pointDir(), string(id)+metaSuffix, meta); err != nil {
		return err
	}
	if err := o.fs.syncDir(o.pointDir()); err != nil {
		return err
	}
	o.store.used.Add(grown)
	o.mu.Lock()
	p := o.points[id]
	p.rec, p.metaKey, p.filesKey = &rec, k.id, k.id
	o.mu.Unlock()
	stats.Checkpoints++
	stats.IO += 2 * (int64(len(files)) + int64(len(meta)))
	return nil
}

// dropKeys takes out of the ring what nothing needs: no file on disk, no Put that began
// before the last rotation, and no file of which nobody knows what sealed it. left says
// that older keys remain.
func (s *Store) dropKeys(stats *ResealStats) (left bool, err error) {
	// No Collect, Reseal or change of a description is in the midst of writing.
	orgs := s.organizations()
	for _, o := range orgs { // in the order of names, and nobody else holds two
		o.collecting.Lock()
		defer o.collecting.Unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	needed := map[keyID]bool{s.ring.newest().id: true}
	for _, o := range s.orgs {
		if !o.keysInUse(s.rotations, needed) {
			return true, nil
		}
	}
	gone := map[keyID]bool{}
	for _, k := range s.ring.keys {
		if !needed[k.id] {
			gone[k.id] = true
		}
	}
	if len(gone) > 0 {
		if err := s.useRingLocked(s.ring.without(gone)); err != nil {
			return true, err
		}
		for id := range gone {
			stats.Dropped = append(stats.Dropped, id.String())
		}
		slices.Sort(stats.Dropped)
	}
	return len(s.ring.keys) > 1, nil
}

// keysInUse notes the keys that files are sealed with; false if that can't be told now.
func (o *orgStore) keysInUse(rotations int, needed map[keyID]bool) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, info := range o.packs {
		if info.key == (keyID{}) {
			return false
		}
		needed[info.key] = true
	}
	for _, p := range o.points {
		if p.storing {
			if p.since != rotations {
				return false
			}
			continue
		}
		if p.metaKey == (keyID{}) || p.filesKey == (keyID{}) {
			return false
		}
		needed[p.metaKey], needed[p.filesKey] = true, true
	}
	return true
}
