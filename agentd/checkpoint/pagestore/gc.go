package pagestore

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"slices"

	"github.com/postern-dev/postern/proto"
)

// CollectStats say what a step of the collection did.
type CollectStats struct {
	Done      bool  // nothing is left to do until something is deleted
	Deleted   int   // packs removed
	Rewritten int   // packs written again without their dead chunks
	Freed     int64 // bytes on disk
	IO        int64 // bytes read and written
}

// rewriteBelow: a pack is written again when less than this share of its chunks is
// alive. Half keeps the waste below the living, at one write for each byte freed.
const rewriteBelow = 0.5

// cycle is a collection under way: first all checkpoints are marked, then the packs
// that were there when it began are swept. It survives between steps; what becomes
// garbage meanwhile waits for the next cycle. Guarded by orgStore.mu.
type cycle struct {
	points []ID                 // still to be marked
	packs  []packID             // still to be swept
	live   map[packID]*liveBits // of packs; absent means nothing lives
}

type liveBits [packChunks / 64]uint64 // 2 KiB for each pack

// segment returns the bits of segment n, as segment.live has them.
func (b *liveBits) segment(n int) uint64 {
	return b[n*segmentChunks/64] >> (n * segmentChunks % 64) & (1<<segmentChunks - 1)
}

func (b *liveBits) set(from, count uint32) {
	for i := from; i < from+count; i++ {
		b[i/64] |= 1 << (i % 64)
	}
}

// mark notes the chunks of a checkpoint as alive.
func (c *cycle) mark(m *manifest) {
	packs := make([]*liveBits, len(m.packs))
	for i, id := range m.packs {
		if packs[i] = c.live[id]; packs[i] == nil {
			packs[i] = &liveBits{}
			c.live[id] = packs[i]
		}
	}
	for _, e := range m.entries {
		for _, r := range e.runs {
			if r.pack != zeroPack {
				packs[r.pack].set(r.first, r.count)
			}
		}
	}
}

// Collect removes chunks that no checkpoint refers to: packs without any are deleted,
// those with few are written again. A step reads and writes about budget bytes and at
// most one pack (64 MiB) more; call it again until Done. Put, Restore and Delete go
// on meanwhile. Nothing of an organization is removed while one of its checkpoints is
// damaged, since nobody knows what that one refers to: the error says which; deleting
// it ends that.
func (s *Store) Collect(ctx context.Context, budget int64) (CollectStats, error) {
	var stats CollectStats
	if err := s.enter(); err != nil {
		return stats, err
	}
	defer s.busy.Done()
	var failed []error
	done := true
	for _, o := range s.organizations() {
		for stats.IO < budget {
			more, err := o.collectStep(ctx, &stats)
			if ctx.Err() != nil {
				return stats, ctx.Err()
			}
			if err != nil {
				failed = append(failed, fmt.Errorf("collect checkpoints of %s: %w", o.name, err))
			}
			if err != nil || !more {
				break
			}
		}
		o.mu.Lock()
		done = done && o.gc == nil && !o.dirty
		o.mu.Unlock()
	}
	stats.Done = done && len(failed) == 0
	if err := errors.Join(failed...); err != nil {
		code := proto.CodeInternal
		if isFull(err) {
			code = proto.CodeStorageFull
		}
		return stats, &proto.Error{Code: code, Message: failed[0].Error(), Err: err}
	}
	return stats, nil
}

// collectStep marks one checkpoint or sweeps one pack; false when there is nothing
// to do.
func (o *orgStore) collectStep(ctx context.Context, stats *CollectStats) (more bool, err error) {
	o.collecting.Lock()
	defer o.collecting.Unlock()
	point, pack, err := o.nextStep()
	switch {
	case err != nil:
		return false, err
	case point != "":
		return true, o.markPoint(point, stats)
	case pack != (packID{}):
		return true, o.sweep(ctx, pack, stats)
	}
	return false, nil
}

// nextStep takes the next checkpoint or pack, beginning a cycle if there is need and
// ending one that is through.
func (o *orgStore) nextStep() (ID, packID, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.gc == nil {
		if !o.dirty {
			return "", packID{}, nil
		}
		c := &cycle{live: map[packID]*liveBits{}}
		for id, p := range o.points {
			if p.damage != nil {
				return "", packID{}, fmt.Errorf("nothing is removed while checkpoint %s is damaged: delete it (%w)", id, p.damage)
			}
			if !p.storing {
				c.points = append(c.points, id)
			}
		}
		for id, p := range o.packs {
			if !p.pending {
				c.packs = append(c.packs, id)
			}
		}
		slices.Sort(c.points)
		slices.SortFunc(c.packs, func(a, b packID) int { return slices.Compare(a[:], b[:]) })
		o.gc, o.dirty = c, false
	}
	if n := len(o.gc.points); n > 0 {
		id := o.gc.points[0]
		o.gc.points = o.gc.points[1:]
		return id, packID{}, nil
	}
	if n := len(o.gc.packs); n > 0 {
		id := o.gc.packs[0]
		o.gc.packs = o.gc.packs[1:]
		return "", id, nil
	}
	o.gc = nil
	return "", packID{}, nil
}

// markPoint reads one checkpoint's list and marks its chunks. Any error ends the
// cycle: sweeping without all marks would remove what is needed.
func (o *orgStore) markPoint(id ID, stats *CollectStats) error {
	_, rec, done, err := o.store.read(id)
	if proto.CodeOf(err) == proto.CodeNotFound {
		return nil // deleted since the cycle began
	}
	var m *manifest
	if err == nil {
		defer done()
		stats.IO += rec.FileSize
		m, err = o.loadFiles(&rec)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if err != nil {
		o.gc, o.dirty = nil, true
		return fmt.Errorf("nothing is removed: checkpoint %s: %w", id, err)
	}
	o.gc.mark(m)
	return nil
}

// sweep deletes a pack, writes it again, or leaves it.
func (o *orgStore) sweep(ctx context.Context, id packID, stats *CollectStats) error {
	p, err := o.openPack(id)
	if errors.Is(err, ErrDamaged) {
		// Whoever refers to it fails with a clear error; if nobody does, it goes.
		p = nil
	} else if err != nil {
		return o.endCycle(err)
	} else {
		defer p.close()
	}
	info, live := o.claim(id, p)
	if info == nil {
		return nil
	}
	stats.IO += int64(packHead + packTail)
	switch {
	case live == nil:
		err = o.deletePack(info, stats)
	default:
		err = o.rewritePack(ctx, p, info, live, stats)
		o.mu.Lock()
		info.edition++
		info.rewriting = false
		o.mu.Unlock()
	}
	if err != nil {
		return o.endCycle(err)
	}
	return nil
}

// endCycle gives the cycle up; the next Collect begins a new one.
func (o *orgStore) endCycle(err error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.gc, o.dirty = nil, true
	return err
}

// claim decides what becomes of a pack, and makes sure that no later Put finds the
// chunks that go. It returns nil if the pack stays as it is: it is in use by a Put
// that is not committed, or most of it is alive. live nil means it goes.
func (o *orgStore) claim(id packID, p *pack) (info *packInfo, live *liveBits) {
	o.mu.Lock()
	defer o.mu.Unlock()
	info = o.packs[id]
	if info == nil || info.pending {
		return nil, nil
	}
	if info.pins > 0 {
		o.dirty = true // look again in the next cycle
		return nil, nil
	}
	live = o.gc.live[id]
	if live == nil {
		info.edition++
		o.index.drop(func(l location) bool { return l.pack == info.num })
		delete(o.index.loaded, info.num)
		delete(o.packs, id)
		return info, nil
	}
	if p == nil || !worthRewriting(p, live) {
		return nil, nil
	}
	info.edition++
	info.rewriting = true
	o.index.drop(func(l location) bool {
		return l.pack == info.num && live[l.chunk/64]&(1<<(l.chunk%64)) == 0
	})
	copied := *live // a Put may mark more meanwhile, of those that stay anyway
	return info, &copied
}

// worthRewriting: few enough of the chunks that are still there are alive.
func worthRewriting(p *pack, live *liveBits) bool {
	there, alive := 0, 0
	for i := range p.segs {
		there += bits.OnesCount64(p.segs[i].live)
		alive += bits.OnesCount64(p.segs[i].live & live.segment(i))
	}
	return float64(alive) < rewriteBelow*float64(there)
}

func (o *orgStore) deletePack(info *packInfo, stats *CollectStats) error {
	path := filepath.Join(o.packDir(), info.id.String()+packSuffix)
	if err := o.fs.remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		o.mu.Lock()
		o.packs[info.id] = info
		o.mu.Unlock()
		return err
	}
	o.store.used.Add(-info.size)
	stats.Deleted++
	stats.Freed += info.size
	return o.fs.syncDir(o.packDir())
}

// rewritePack writes p again under its name, without dead chunks, with the same
// numbers, and packs tighter what stays. Those who have the old file open keep it.
func (o *orgStore) rewritePack(ctx context.Context, p *pack, info *packInfo, live *liveBits, stats *CollectStats) error {
	hashes, err := p.readHashes()
	if errors.Is(err, ErrDamaged) {
		return nil // Verify reports it
	} else if err != nil {
		return err
	}
	s := newScratch()
	defer s.close()
	w, err := o.newPack(info.id)
	if err != nil {
		return err
	}
	if err := rewriteSegments(ctx, s, w, p, hashes, live); err != nil {
		w.abort()
		if errors.Is(err, ErrDamaged) {
			return nil // as above
		}
		return err
	}
	size, err := w.finish()
	if err != nil {
		return err
	}
	o.mu.Lock()
	info.size, size = size, info.size-size
	o.mu.Unlock()
	o.store.used.Add(-size)
	stats.Rewritten++
	stats.Freed += size
	stats.IO += w.off + size + w.off
	if err := o.fs.syncDir(o.packDir()); err != nil {
		return err
	}
	// Not before: a power cut could bring back the file that an old key seals.
	o.mu.Lock()
	info.key = w.key
	o.mu.Unlock()
	return nil
}

func rewriteSegments(ctx context.Context, s *scratch, w *packWriter, p *pack, hashes []chunkHash, live *liveBits) error {
	var sealed []byte
	for n := range p.segs {
		if err := ctx.Err(); err != nil {
			return err
		}
		chunks := int(p.segs[n].chunks)
		first := n * segmentChunks
		keep := p.segs[n].live & live.segment(n)
		for i := range chunks {
			if keep&(1<<i) == 0 {
				hashes[first+i] = deadChunk
			}
		}
		c, body := codecGone, []byte(nil)
		if keep != 0 {
			plain, err := s.read(p, n)
			if err != nil {
				return err
			}
			plain = slices.Clone(plain) // s.pack uses the same buffer
			for i := range chunks {
				if keep&(1<<i) == 0 {
					clear(plain[i*ChunkSize : (i+1)*ChunkSize])
				}
			}
			if c, sealed, err = s.pack(sealed[:0], codecZstd, w.aead, n, plain); err != nil {
				return err
			}
			body = sealed
		}
		if err := w.add(c, body, hashes[first:first+chunks]); err != nil {
			return err
		}
	}
	return nil
}
