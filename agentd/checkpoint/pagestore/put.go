package pagestore

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/postern-dev/postern/proto"
)

// Tree is a directory to be stored or restored: CRIU's images, or a copy of the
// kernel's private files.
type Tree struct {
	Name string // [a-z0-9-], 1 to 64 characters, once in a checkpoint
	Dir  string
}

// PutStats say what storing a checkpoint took.
type PutStats struct {
	Size      int64         // bytes of all files, holes included
	Zero      int64         // bytes of them that are zero
	Known     int64         // bytes that were stored already
	New       int64         // bytes that had to be stored, before compression
	Written   int64         // bytes on disk for it: chunks, lists, description
	Files     int           // files, directories and links
	Sockets   int           // sockets left out: CRIU makes them again
	Duration  time.Duration // all of it
	Committed time.Duration // of it, for the last sync and rename
}

// Put stores trees as a checkpoint. When it returns nil, the checkpoint is on stable
// storage and stays; otherwise nothing of it does. Errors have the codes INVALID
// (names, unsupported kinds of files), ALREADY_EXISTS, STORAGE_FULL, CANCELLED or
// INTERNAL.
//
// The trees must not change meanwhile: call it on images of a finished dump and on
// a snapshot of files, not on directories that a running kernel writes to. Symbolic
// links are stored as links, never followed. Sockets are left out, devices refused.
//
// m.Parent, if it is known, makes sure that chunks of that checkpoint are found, even
// when the index has no room for all of the organization's. It need not exist.
func (s *Store) Put(ctx context.Context, m Meta, trees []Tree) (Checkpoint, PutStats, error) {
	if m.ID == "" {
		m.ID = NewID()
	}
	if m.Time.IsZero() {
		m.Time = time.Now()
	}
	m.Time = m.Time.UTC().Round(0)
	if err := checkTrees(trees); err != nil {
		return Checkpoint{}, PutStats{}, err
	}
	return s.put(ctx, m, func(ctx context.Context, p *putter) error { return p.readTrees(ctx, trees) })
}

func checkTrees(trees []Tree) error {
	if len(trees) == 0 || len(trees) > maxTrees {
		return invalid("store a checkpoint: %d directories, must be 1 to %d", len(trees), maxTrees)
	}
	seen := map[string]bool{}
	for _, t := range trees {
		if !validTree(t.Name) || seen[t.Name] {
			return invalid("store a checkpoint: %q is not a name of [a-z0-9-], or there twice", t.Name)
		}
		seen[t.Name] = true
	}
	return nil
}

// put runs one Put or Import: read feeds the putter with items.
func (s *Store) put(ctx context.Context, m Meta, read func(context.Context, *putter) error) (Checkpoint, PutStats, error) {
	start := time.Now()
	if err := m.check(); err != nil {
		return Checkpoint{}, PutStats{}, err
	}
	if err := s.enter(); err != nil {
		return Checkpoint{}, PutStats{}, inCheckpoint("store", m.ID, err)
	}
	defer s.busy.Done()
	o, err := s.organization(m.Organization, true)
	if err != nil {
		return Checkpoint{}, PutStats{}, inCheckpoint("store", m.ID, err)
	}
	if err := s.reserveID(o, m.ID); err != nil {
		return Checkpoint{}, PutStats{}, err
	}
	p := &putter{o: o, meta: m, letGo: func() {}, local: map[chunkHash]location{}, inManifest: map[uint32]uint32{}, manifest: &manifest{}}
	cp, err := p.run(ctx, read)
	p.letGo()
	if err != nil {
		p.abort()
		return Checkpoint{}, PutStats{}, inCheckpoint("store", m.ID, err)
	}
	p.stats.Duration = time.Since(start)
	return cp, p.stats, nil
}

// reserveID claims an id that no organization has.
func (s *Store) reserveID(o *orgStore, id ID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, other := range s.orgs {
		other.mu.Lock()
		taken := other.points[id] != nil
		other.mu.Unlock()
		if taken {
			return proto.Errorf(proto.CodeAlreadyExists, "store checkpoint %s: it exists already", id)
		}
	}
	o.mu.Lock()
	o.points[id] = &point{storing: true, since: s.rotations}
	o.mu.Unlock()
	return nil
}

// putter stores one checkpoint.
type putter struct {
	o        *orgStore
	meta     Meta
	manifest *manifest
	stats    PutStats
	reserved int64  // bytes added to Store.used
	visible  bool   // the .meta file may be there
	letGo    func() // of what an Import holds
	pipes    *pipes

	// Of the goroutine that looks chunks up.
	local      map[chunkHash]location // new chunks of this Put
	inManifest map[uint32]uint32      // pack's number to index in manifest.packs
	pinned     []*packInfo
	seg        *segmentJob
	packs      []*newPackState // in order; the last one is being filled
}

// newPackState is a pack of this Put.
type newPackState struct {
	info *packInfo
	w    *packWriter
	segs int // given out so far
	done bool
}

// maxLocal bounds putter.local, 40 bytes each; beyond it, equal new chunks far apart
// in one checkpoint are stored twice.
const maxLocal = 2 << 20

func (p *putter) run(ctx context.Context, read func(context.Context, *putter) error) (Checkpoint, error) {
	if err := p.o.loadIndex(ctx, p.meta.Parent); err != nil {
		return Checkpoint{}, err
	}
	if err := p.pipeline(ctx, read); err != nil {
		return Checkpoint{}, err
	}
	if err := ctx.Err(); err != nil {
		return Checkpoint{}, err
	}
	start := time.Now()
	cp, err := p.commit()
	p.stats.Committed = time.Since(start)
	return cp, err
}

// grow counts n bytes about to be written.
func (p *putter) grow(n int64) error {
	p.reserved += n
	limit := p.o.store.opts.Limit
	if used := p.o.store.used.Add(n); limit > 0 && used > limit {
		return proto.Errorf(proto.CodeStorageFull,
			"the checkpoint store would take %d MiB, its limit is %d MiB: delete checkpoints, or raise the limit", used>>20, limit>>20)
	}
	return nil
}

// look decides for each chunk of b whether it is new, and appends it to its file.
func (p *putter) look(ctx context.Context, b *block) error {
	found := p.lookup(b)
	for i := range b.chunks {
		r := run{pack: zeroPack, count: 1}
		switch {
		case b.zero[i]:
			p.stats.Zero += ChunkSize
		case found[i].pack != unknown:
			p.stats.Known += ChunkSize
			r.pack, r.first = p.inManifest[found[i].pack], found[i].chunk
		default:
			l, known := p.local[b.hashes[i]]
			if known {
				p.stats.Known += ChunkSize
			} else {
				var err error
				if l, err = p.store(ctx, b.hashes[i], b.buf[i*ChunkSize:(i+1)*ChunkSize]); err != nil {
					return err
				}
				p.stats.New += ChunkSize
			}
			r.pack, r.first = p.inManifest[l.pack], l.chunk
		}
		b.entry.addRun(r)
	}
	return nil
}

const unknown = zeroPack

// lookup asks the index for all chunks of a block, and pins the packs it names.
func (p *putter) lookup(b *block) (found [blockChunks]location) {
	o := p.o
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range b.chunks {
		found[i].pack = unknown
		if b.zero[i] {
			continue
		}
		l, known := o.index.chunks[b.hashes[i]]
		if !known {
			continue
		}
		if _, pinned := p.inManifest[l.pack]; !pinned {
			info := o.byNum[l.pack]
			info.pins++
			p.pinned = append(p.pinned, info)
			o.index.touch(l.pack)
			p.refer(l.pack, info.id)
		}
		found[i] = l
	}
	return found
}

// refer gives a pack its place in the manifest.
func (p *putter) refer(num uint32, id packID) {
	p.inManifest[num] = uint32(len(p.manifest.packs))
	p.manifest.packs = append(p.manifest.packs, id)
}

// commit makes the checkpoint durable, in the order that a crash anywhere needs.
func (p *putter) commit() (Checkpoint, error) {
	o := p.o
	var edition [16]byte
	if _, err := rand.Read(edition[:]); err != nil {
		return Checkpoint{}, err
	}
	rec := &record{Checkpoint: Checkpoint{Meta: p.meta}, Files: hex.EncodeToString(edition[:])}
	for _, e := range p.manifest.entries {
		rec.Size += e.size
	}
	p.stats.Size = rec.Size
	plain, err := p.manifest.encode()
	if err != nil {
		return Checkpoint{}, err
	}
	k := o.keyset().newest
	files := k.seal(filesMagic, o.place(rec.ID)+"\x00"+rec.Files, plain)
	if len(files) > maxFiles {
		return Checkpoint{}, invalid("its list of files takes %d MiB, the bound is %d", len(files)>>20, maxFiles>>20)
	}
	if err := p.grow(int64(len(files))); err != nil {
		return Checkpoint{}, err
	}
	rec.FileSize = int64(len(files))
	rec.Written = p.reserved
	meta, err := o.sealRecord(k, rec)
	if err != nil {
		return Checkpoint{}, err
	}
	if err := p.grow(int64(len(meta))); err != nil {
		return Checkpoint{}, err
	}
	for _, step := range []func() error{
		func() error { return o.fs.syncDir(o.packDir()) },
		func() error { return writeWhole(o.fs, o.pointDir(), string(rec.ID)+fileSuffix, files) },
		func() error { return o.fs.syncDir(o.pointDir()) },
		func() error {
			p.visible = true
			return writeWhole(o.fs, o.pointDir(), string(rec.ID)+metaSuffix, meta)
		},
		func() error { return o.fs.syncDir(o.pointDir()) },
	} {
		if err := step(); err != nil {
			return Checkpoint{}, err
		}
	}
	p.stats.Written = p.reserved
	p.stats.Files = len(p.manifest.entries)
	p.publish(rec, k.id)
	return rec.Checkpoint, nil
}

// publish lets others see the checkpoint and its chunks.
func (p *putter) publish(rec *record, key keyID) {
	o := p.o
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, n := range p.packs {
		n.info.pending, n.info.size = false, n.w.off
		o.index.add(n.info.num, n.w.hashes)
	}
	if o.gc != nil {
		o.gc.mark(p.manifest)
	}
	p.unpinLocked()
	o.points[rec.ID] = &point{rec: rec, metaKey: key, filesKey: key}
}

func (p *putter) unpinLocked() {
	for _, info := range p.pinned {
		info.pins--
	}
	p.pinned = nil
}

// abort removes all that was written: first what makes the checkpoint one, durably,
// so that no crash can leave it without its chunks. What can't be removed now is an
// orphan that the next Open and Collect clear away.
func (p *putter) abort() {
	o := p.o
	err := error(nil)
	if p.visible {
		if err = o.fs.remove(o.metaPath(p.meta.ID)); err == nil || errors.Is(err, os.ErrNotExist) {
			err = o.fs.syncDir(o.pointDir())
		}
	}
	for _, n := range p.packs {
		switch {
		case !n.done:
			n.w.abort()
		case err == nil:
			o.fs.remove(n.w.final()) //nolint:errcheck // see above
		}
	}
	if err == nil {
		o.fs.remove(o.filesPath(p.meta.ID)) //nolint:errcheck // mostly not there
		o.store.used.Add(-p.reserved)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, n := range p.packs {
		delete(o.packs, n.info.id)
	}
	p.unpinLocked()
	delete(o.points, p.meta.ID)
}

// loadIndex reads the hashes of packs that the index lacks: those of the parent
// first, whatever they displace, then the newest for which there is room.
func (o *orgStore) loadIndex(ctx context.Context, parent ID) error {
	var first []packID
	if parent != "" {
		var err error
		if first, err = o.packsOf(parent); err != nil {
			return err
		}
	}
	type want struct {
		info    *packInfo
		edition int
	}
	var wants []want
	o.mu.Lock()
	must := map[packID]bool{}
	for _, id := range first {
		if info := o.packs[id]; info != nil && !must[id] && info.indexable() {
			must[id] = true
			if o.index.has(info.num) {
				o.index.touch(info.num)
			} else {
				wants = append(wants, want{info, info.edition})
			}
		}
	}
	others := len(wants)
	for id, info := range o.packs {
		if !must[id] && info.indexable() && !o.index.has(info.num) {
			wants = append(wants, want{info, info.edition})
		}
	}
	slices.SortFunc(wants[others:], func(a, b want) int { return slices.Compare(b.info.id[:], a.info.id[:]) })
	o.mu.Unlock()
	for i, w := range wants {
		if err := ctx.Err(); err != nil {
			return err
		}
		if i >= others && !o.indexHasRoom() {
			break
		}
		hashes, err := o.packHashes(w.info.id)
		if err != nil {
			if errors.Is(err, ErrDamaged) { // its chunks are not found, so stored again
				o.store.log.Error("a pack of checkpoints is damaged", "organization", o.name, "err", err)
				continue
			}
			return fmt.Errorf("read the index of chunks: %w", err)
		}
		o.mu.Lock()
		if o.packs[w.info.id] == w.info && w.info.edition == w.edition && w.info.indexable() && !o.index.has(w.info.num) {
			o.index.add(w.info.num, hashes)
		}
		o.mu.Unlock()
	}
	return nil
}

// indexable: the list of hashes in the pack's file is one to find chunks by.
func (i *packInfo) indexable() bool { return !i.pending && !i.rewriting && !i.damaged }

func (o *orgStore) indexHasRoom() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.index.chunks)+packChunks <= o.index.limit
}

func (o *orgStore) packHashes(id packID) ([]chunkHash, error) {
	p, err := o.openPack(id)
	if err != nil {
		return nil, err
	}
	defer p.close()
	return p.readHashes()
}

// packsOf lists the packs of a checkpoint; none if it is gone or damaged.
func (o *orgStore) packsOf(id ID) ([]packID, error) {
	_, rec, done, err := o.store.read(id)
	if err != nil {
		return nil, nil //nolint:nilerr // a parent helps to find chunks, no more
	}
	defer done()
	if rec.Organization != o.name {
		return nil, nil
	}
	m, err := o.loadFiles(&rec)
	if errors.Is(err, ErrDamaged) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	return m.packs, nil
}
