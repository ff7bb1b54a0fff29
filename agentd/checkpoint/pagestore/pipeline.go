package pagestore

import (
	"context"

	"golang.org/x/sync/errgroup"
)

// The pipeline of a Put:
//
//	read (1) -> hash (n) -> look up, gather segments (1) -> compress, seal (n) -> write (1)
//
// Items and segments keep their order: they wait in a queue from the moment they are
// made, and whoever takes one out waits until its worker is done with it.

const (
	blockChunks = 256 // 1 MiB
	blockBytes  = blockChunks * ChunkSize
)

// item is what the reader hands over: the start of an entry, some of its chunks, or
// a hole in it.
type item struct {
	start bool       // entry begins
	hole  uint32     // chunks of zeros
	given []location // chunks that are stored already
	*block
	entry *entry
}

// block is up to blockChunks chunks of a file, the last one zero-padded.
type block struct {
	entry  *entry
	buf    []byte // blockBytes
	chunks int
	zero   [blockChunks]bool
	hashes [blockChunks]chunkHash
	hashed chan struct{}
}

// segmentJob is a segment on its way to its pack.
type segmentJob struct {
	pack   *newPackState
	num    int
	last   bool // of its pack
	plain  []byte
	hashes []chunkHash
	codec  codec
	sealed []byte
	done   chan struct{}
}

// pipes are the queues of one Put. Each holds one or two things for each worker:
// that bounds the memory of a Put, and a full one makes those before it wait.
type pipes struct {
	items  chan item        // in order
	hash   chan *block      // to be hashed
	free   chan *block      // blocks to fill
	segs   chan *segmentJob // in order
	seal   chan *segmentJob // to be sealed
	spare  chan *segmentJob // jobs to fill
	failed <-chan struct{}  // the Put ends with an error
}

func (p *putter) newPipes(ctx context.Context, workers int) *pipes {
	blocks := workers + 2
	q := &pipes{
		items: make(chan item, blocks), hash: make(chan *block, blocks), free: make(chan *block, blocks),
		segs: make(chan *segmentJob, 2*workers), seal: make(chan *segmentJob, 2*workers), spare: make(chan *segmentJob, 2*workers+1),
		failed: ctx.Done(),
	}
	for range blocks {
		q.free <- &block{hashed: make(chan struct{}, 1)}
	}
	for range cap(q.spare) {
		q.spare <- &segmentJob{done: make(chan struct{}, 1)}
	}
	return q
}

// pipeline runs read and all that follows, until everything is in finished packs.
func (p *putter) pipeline(ctx context.Context, read func(context.Context, *putter) error) error {
	g, ctx := errgroup.WithContext(ctx)
	workers := p.o.store.opts.Workers
	p.pipes = p.newPipes(ctx, workers)
	g.Go(func() error {
		defer close(p.pipes.items)
		defer close(p.pipes.hash)
		return read(ctx, p)
	})
	for range workers {
		g.Go(func() error { return p.hashBlocks(ctx) })
		g.Go(func() error { return p.sealSegments(ctx) })
	}
	g.Go(func() error {
		defer close(p.pipes.segs)
		defer close(p.pipes.seal)
		return p.lookItems(ctx)
	})
	g.Go(func() error { return p.writeSegments(ctx) })
	return g.Wait()
}

// send and receive give up when the Put fails.
func send[T any](ctx context.Context, to chan<- T, v T) error {
	select {
	case to <- v:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func receive[T any](ctx context.Context, from <-chan T) (v T, ok bool, err error) {
	select {
	case v, ok = <-from:
		return v, ok, nil
	case <-ctx.Done():
		return v, false, context.Cause(ctx)
	}
}

// begin, hole and chunks are what readers call, in the order of entries and files.

func (p *putter) begin(ctx context.Context, e *entry) error {
	return send(ctx, p.pipes.items, item{start: true, entry: e})
}

func (p *putter) hole(ctx context.Context, e *entry, chunks int64) error {
	for chunks > 0 {
		n := min(chunks, 1<<30)
		if err := send(ctx, p.pipes.items, item{entry: e, hole: uint32(n)}); err != nil {
			return err
		}
		chunks -= n
	}
	return nil
}

// freeBlock returns an empty block, whose buffer's content is left over.
func (p *putter) freeBlock(ctx context.Context) (*block, error) {
	b, _, err := receive(ctx, p.pipes.free)
	if err == nil && b.buf == nil {
		b.buf = make([]byte, blockBytes)
	}
	return b, err
}

// chunks hands over a filled block; the caller has padded its last chunk.
func (p *putter) chunks(ctx context.Context, e *entry, b *block) error {
	b.entry = e
	if err := send(ctx, p.pipes.items, item{entry: e, block: b}); err != nil {
		return err
	}
	return send(ctx, p.pipes.hash, b)
}

var zeroChunk [ChunkSize]byte

func (p *putter) hashBlocks(ctx context.Context) error {
	h := newHasher(p.o.keyset().newest)
	for {
		b, ok, err := receive(ctx, p.pipes.hash)
		if err != nil || !ok {
			return err
		}
		for i := range b.chunks {
			chunk := b.buf[i*ChunkSize : (i+1)*ChunkSize]
			if b.zero[i] = string(chunk) == string(zeroChunk[:]); !b.zero[i] {
				b.hashes[i] = h.hash(chunk)
			}
		}
		b.hashed <- struct{}{}
	}
}

func (p *putter) lookItems(ctx context.Context) error {
	for {
		it, ok, err := receive(ctx, p.pipes.items)
		if err != nil {
			return err
		}
		if !ok {
			return p.endSegment(ctx, true)
		}
		switch {
		case it.start:
			if len(p.manifest.entries) >= maxEntries {
				return invalid("more than %d files and directories", maxEntries)
			}
			p.manifest.entries = append(p.manifest.entries, it.entry)
		case it.hole > 0:
			p.stats.Zero += int64(it.hole) * ChunkSize
			it.entry.addRun(run{pack: zeroPack, count: it.hole})
		case it.given != nil:
			p.give(it.entry, it.given)
		default:
			if _, _, err := receive(ctx, it.hashed); err != nil {
				return err
			}
			if err := p.look(ctx, it.block); err != nil {
				return err
			}
			p.pipes.free <- it.block
		}
	}
}

// store puts a new chunk into the segment being gathered.
func (p *putter) store(ctx context.Context, h chunkHash, chunk []byte) (location, error) {
	if p.seg == nil {
		if err := p.beginSegment(ctx); err != nil {
			return location{}, err
		}
	}
	l := location{pack: p.seg.pack.info.num, chunk: uint32(p.seg.num*segmentChunks + len(p.seg.hashes))}
	p.seg.plain = append(p.seg.plain, chunk...)
	p.seg.hashes = append(p.seg.hashes, h)
	if len(p.local) >= maxLocal {
		clear(p.local)
	}
	p.local[h] = l
	if len(p.seg.hashes) == segmentChunks {
		return l, p.endSegment(ctx, false)
	}
	return l, nil
}

// beginSegment takes the next number in the last pack, or in a new one.
func (p *putter) beginSegment(ctx context.Context) error {
	n := len(p.packs)
	if n == 0 || p.packs[n-1].segs == packSegments {
		if err := p.beginPack(); err != nil {
			return err
		}
		n = len(p.packs)
	}
	job, _, err := receive(ctx, p.pipes.spare)
	if err != nil {
		return err
	}
	if job.plain == nil {
		job.plain = make([]byte, 0, segmentSize)
		job.sealed = make([]byte, 0, segmentSize+sealedMore)
	}
	pack := p.packs[n-1]
	job.pack, job.num, job.last, job.plain = pack, pack.segs, false, job.plain[:0]
	job.hashes = make([]chunkHash, 0, segmentChunks)
	pack.segs++
	p.seg = job
	return nil
}

func (p *putter) beginPack() error {
	o := p.o
	w, err := o.newPack(newPackID())
	if err != nil {
		return err
	}
	o.mu.Lock()
	info := o.addPackLocked(w.id)
	info.pending, info.key = true, w.key
	o.mu.Unlock()
	p.packs = append(p.packs, &newPackState{info: info, w: w})
	p.refer(info.num, w.id)
	return nil
}

// endSegment sends off the segment being gathered. finish means that no more follow:
// then there may be none, and a short pack must be told that it is complete.
func (p *putter) endSegment(ctx context.Context, finish bool) error {
	job := p.seg
	if job == nil {
		if !finish || len(p.packs) == 0 || p.packs[len(p.packs)-1].segs == packSegments {
			return nil
		}
		return send(ctx, p.pipes.segs, &segmentJob{pack: p.packs[len(p.packs)-1], last: true})
	}
	p.seg = nil
	job.last = finish || job.num == packSegments-1
	if err := send(ctx, p.pipes.segs, job); err != nil {
		return err
	}
	return send(ctx, p.pipes.seal, job)
}

func (p *putter) sealSegments(ctx context.Context) error {
	s := newScratch()
	defer s.close()
	for {
		job, ok, err := receive(ctx, p.pipes.seal)
		if err != nil || !ok {
			return err
		}
		job.codec, job.sealed, err = s.pack(job.sealed[:0], codecLZ4, job.pack.w.aead, job.num, job.plain)
		if err != nil {
			return err
		}
		job.done <- struct{}{}
	}
}

func (p *putter) writeSegments(ctx context.Context) error {
	for {
		job, ok, err := receive(ctx, p.pipes.segs)
		if err != nil || !ok {
			return err
		}
		if job.done != nil {
			if _, _, err := receive(ctx, job.done); err != nil {
				return err
			}
			if err := p.grow(int64(len(job.sealed))); err != nil {
				return err
			}
			if err := job.pack.w.add(job.codec, job.sealed, job.hashes); err != nil {
				return err
			}
		}
		if job.last {
			if err := p.finishPack(job.pack); err != nil {
				return err
			}
		}
		if job.done != nil {
			p.pipes.spare <- job
		}
	}
}

func (p *putter) finishPack(n *newPackState) error {
	before := n.w.off
	segs := int64(0)
	for _, s := range n.w.segs {
		segs += int64(s.stored)
	}
	size, err := n.w.finish()
	if err != nil {
		return err
	}
	n.done = true
	return p.grow(size - before + (before - segs)) // header, table, hashes, trailer
}
