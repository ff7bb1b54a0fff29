package pagestore

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"hash"
	"io"
)

const (
	// askChunks is how many chunks are asked for at once: 16 MiB, so that a round trip of
	// 50 ms costs little.
	askChunks = 4096
	// askFrom is from how many chunks of a file on it is worth a round trip.
	askFrom = 64
)

// Known lets Export leave out what the importing store has already.
type Known struct {
	// Key is what that store's HashKey returned.
	Key []byte
	// Ask is called when a question for n chunks was written to w. It must bring all of w
	// to Import, and returns what that answered.
	Ask func() ([]byte, error)
}

// HashKey is the key that chunks of an organization are known by in this store, for an
// exporting store of the same organization. Who has it and this store's other keys could
// test guesses at contents; by itself it says nothing.
func (s *Store) HashKey(organization string) ([]byte, error) {
	if !plainName(organization) {
		return nil, invalid("organization %q is not a name of [a-z0-9_-]", organization)
	}
	if err := s.enter(); err != nil {
		return nil, err
	}
	defer s.busy.Done()
	o, err := s.organization(organization, true)
	if err != nil {
		return nil, err
	}
	return o.keyset().newest.hash[:], nil
}

// asker gathers chunks, asks for them together, and writes those that are missing.
type asker struct {
	x     *exporter
	known *Known
	flush func() error
	mac   hash.Hash
	ops   []askOp
	data  []byte
	head  []byte
}

// askOp is some chunks of data, or of zeros.
type askOp struct {
	zero bool
	n    int
}

func newAsker(x *exporter, known *Known, flush func() error) *asker {
	return &asker{x: x, known: known, flush: flush, mac: hmac.New(sha256.New, known.Key)}
}

// zeros and chunks gather; end writes what was gathered.
func (a *asker) zeros(n uint32) { a.ops = append(a.ops, askOp{true, int(n)}) }

func (a *asker) chunks(chunks []byte) error {
	for len(chunks) > 0 {
		if len(a.data) == askChunks*ChunkSize || len(a.ops) == askChunks {
			if err := a.end(); err != nil {
				return err
			}
		}
		n := min(len(chunks), askChunks*ChunkSize-len(a.data))
		a.data = append(a.data, chunks[:n]...)
		a.ops = append(a.ops, askOp{n: n / ChunkSize})
		chunks = chunks[n:]
	}
	return nil
}

func (a *asker) end() error {
	defer func() { a.ops, a.data = a.ops[:0], a.data[:0] }()
	n := len(a.data) / ChunkSize
	var answer []byte
	if n > 0 {
		a.head = a.head[:0]
		for i := range n {
			a.mac.Reset()
			a.mac.Write(a.data[i*ChunkSize : (i+1)*ChunkSize])
			var sum [sha256.Size]byte
			a.head = append(a.head, a.mac.Sum(sum[:0])[:len(chunkHash{})]...)
		}
		if err := a.x.op('Q', uint64(n), a.head); err != nil {
			return err
		}
		if err := a.flush(); err != nil {
			return err
		}
		var err error
		if answer, err = a.known.Ask(); err != nil {
			return err
		}
		if len(answer) != (n+7)/8 {
			return errStream
		}
	}
	at := 0
	for _, op := range a.ops {
		if op.zero {
			if err := a.x.op('Z', uint64(op.n), nil); err != nil {
				return err
			}
			continue
		}
		for end := at + op.n; at < end; {
			has := answer[at/8]>>(at%8)&1 == 1
			n := 1
			for at+n < end && (answer[(at+n)/8]>>((at+n)%8)&1 == 1) == has && (has || n < segmentChunks) {
				n++
			}
			var err error
			if has {
				err = a.x.op('K', uint64(n), nil)
			} else {
				err = a.x.op('D', uint64(n), a.data[at*ChunkSize:(at+n)*ChunkSize])
			}
			if err != nil {
				return err
			}
			at += n
		}
	}
	return nil
}

// writeRuns writes an entry's chunks.
func (x *exporter) writeRuns(ctx context.Context, e *entry) error {
	var chunks int
	for _, r := range e.runs {
		if r.pack != zeroPack {
			chunks += int(r.count)
		}
	}
	asks := x.asker != nil && chunks >= askFrom
	for _, r := range e.runs {
		if err := ctx.Err(); err != nil {
			return err
		}
		var err error
		switch {
		case !asks:
			err = x.writeRun(r, func(chunks []byte) error { return x.op('D', uint64(len(chunks)/ChunkSize), chunks) })
		case r.pack == zeroPack:
			x.asker.zeros(r.count)
		default:
			err = x.writeRun(r, x.asker.chunks)
		}
		if err != nil {
			return err
		}
	}
	if asks {
		return x.asker.end()
	}
	return nil
}

// answered are the chunks of a question: where they are here, if they are.
type answered struct {
	places []location
	at     int
	pinned map[uint32]*packInfo
}

// question reads hashes and says which of the chunks are here. They stay here until the
// import has ended.
func (i *importer) question(p *putter) error {
	n, err := i.count(askChunks)
	if err != nil {
		return err
	}
	if i.answer == nil || i.asked.at < len(i.asked.places) {
		return errStream
	}
	hashes := make([]chunkHash, n)
	for k := range hashes {
		if _, err := io.ReadFull(i.r, hashes[k][:]); err != nil {
			return err
		}
	}
	bitmap := make([]byte, (n+7)/8)
	i.asked.places, i.asked.at = make([]location, n), 0
	o := p.o
	o.mu.Lock()
	for k, h := range hashes {
		l, known := o.index.chunks[h]
		if !known {
			i.asked.places[k].pack = unknown
			continue
		}
		if i.asked.pinned[l.pack] == nil {
			info := o.byNum[l.pack]
			info.pins++
			if i.asked.pinned == nil {
				i.asked.pinned = map[uint32]*packInfo{}
			}
			i.asked.pinned[l.pack] = info
			o.index.touch(l.pack)
		}
		i.asked.places[k] = l
		bitmap[k/8] |= 1 << (k % 8)
	}
	o.mu.Unlock()
	return i.answer(bitmap)
}

// unpin lets go of what questions held.
func (i *importer) unpin(o *orgStore) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, info := range i.asked.pinned {
		info.pins--
	}
	i.asked.pinned = nil
}

// readKnown takes chunks that are here.
func (i *importer) readKnown(ctx context.Context, p *putter) error {
	n, err := i.take(askChunks)
	if err != nil {
		return err
	}
	if err := i.flush(ctx, p); err != nil {
		return err
	}
	if int64(len(i.asked.places)-i.asked.at) < n {
		return errStream
	}
	places := i.asked.places[i.asked.at:][:n]
	i.asked.at += int(n)
	for _, l := range places {
		if l.pack == unknown {
			return errStream
		}
	}
	return send(ctx, p.pipes.items, item{entry: i.current, given: places})
}

// give appends chunks to a file that are in packs already, which somebody has pinned.
func (p *putter) give(e *entry, places []location) {
	for _, l := range places {
		if _, there := p.inManifest[l.pack]; !there {
			p.o.mu.Lock()
			info := p.o.byNum[l.pack]
			info.pins++
			p.pinned = append(p.pinned, info)
			p.refer(l.pack, info.id)
			p.o.mu.Unlock()
		}
		e.addRun(run{pack: p.inManifest[l.pack], first: l.chunk, count: 1})
		p.stats.Known += ChunkSize
	}
}
