package pagestore

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/postern-dev/postern/proto"
)

// A checkpoint on its way to another host is one zstd stream of
//
//	"PSTMOVE1" | length, Checkpoint as JSON | trees
//	'E' length, entry | 'Z' chunks of zeros | 'D' chunks, their bytes | ... | 'X' entries
//	'Q' chunks, their hashes | 'K' chunks
//
// with uvarints for numbers, in the order of the list of files. It is plaintext: the
// caller encrypts it, and the receiving host seals it under its own key. If the exporter
// has the receiver's key for hashes, it asks for the chunks of large files before it sends
// them: the receiver answers 'Q' with a bitmap of those that it has, which come as 'K' then,
// the others as 'D', in the order of the question.

const moveMagic = "PSTMOVE1"

// moveMemory bounds what the receiver's decompressor holds.
const moveMemory = 8 << 20

// Export writes a checkpoint to w, for Import on another host of the organization.
// The stream holds its memory in the clear: encrypt it, keep it nowhere. Everything is
// authenticated before it is written; after an error w holds a stream that Import
// refuses. known, if not nil, says what need not be sent. It takes about 16 MiB, and
// another 16 MiB with known.
func (s *Store) Export(ctx context.Context, id ID, w io.Writer, known *Known) error {
	if err := s.enter(); err != nil {
		return inCheckpoint("export", id, err)
	}
	defer s.busy.Done()
	o, rec, done, err := s.read(id)
	if err != nil {
		return err
	}
	defer done()
	m, err := o.loadFiles(&rec)
	if err != nil {
		return inCheckpoint("export", id, err)
	}
	z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
	if err != nil {
		return inCheckpoint("export", id, err)
	}
	x := &exporter{w: z, m: m, segs: newSegmentCache(o)}
	defer x.segs.close()
	if known != nil {
		x.asker = newAsker(x, known, z.Flush)
	}
	if err := x.run(ctx, &rec.Checkpoint); err != nil {
		// Without its end, the stream is refused: nothing more may be written.
		z.Reset(io.Discard)
		z.Close() //nolint:errcheck // it writes nowhere
		return inCheckpoint("export", id, err)
	}
	return inCheckpoint("export", id, z.Close())
}

type exporter struct {
	w    io.Writer
	m    *manifest
	segs *segmentCache
	head []byte
	// asker is nil if everything is sent.
	asker *asker
}

// op writes a letter and a number, and then what follows them.
func (x *exporter) op(letter byte, n uint64, data []byte) error {
	x.head = binary.AppendUvarint(append(x.head[:0], letter), n)
	if _, err := x.w.Write(x.head); err != nil {
		return err
	}
	_, err := x.w.Write(data)
	return err
}

func (x *exporter) run(ctx context.Context, c *Checkpoint) error {
	meta, err := json.Marshal(c)
	if err != nil {
		return err
	}
	head := appendString([]byte(moveMagic), string(meta))
	if _, err := x.w.Write(appendTrees(head, x.m.trees)); err != nil {
		return err
	}
	for _, e := range x.m.entries {
		b := appendEntry(nil, e)
		if err := x.op('E', uint64(len(b)), b); err != nil {
			return err
		}
		if err := x.writeRuns(ctx, e); err != nil {
			return err
		}
	}
	return x.op('X', uint64(len(x.m.entries)), nil)
}

func (x *exporter) writeRun(r run, write func(chunks []byte) error) error {
	if r.pack == zeroPack {
		return x.op('Z', uint64(r.count), nil)
	}
	for first, left := int(r.first), int(r.count); left > 0; {
		from := first % segmentChunks
		n := min(left, segmentChunks-from)
		chunks, err := x.segs.chunks(x.m.packs[r.pack], first/segmentChunks, from, from+n)
		if err != nil {
			return err
		}
		if err := write(chunks); err != nil {
			return err
		}
		first, left = first+n, left-n
	}
	return nil
}

// segmentCache keeps segments that were read lately, since files jump between them.
type segmentCache struct {
	packs   *packCache
	scratch *scratch
	order   []segmentKey // oldest first
	segs    map[segmentKey][]byte
}

type segmentKey struct {
	pack packID
	n    int
}

const cachedSegments = 64 // 8 MiB

func newSegmentCache(o *orgStore) *segmentCache {
	return &segmentCache{packs: newPackCache(o), scratch: newScratch(), segs: map[segmentKey][]byte{}}
}

func (c *segmentCache) close() {
	c.packs.close()
	c.scratch.close()
}

// chunks returns chunks from to to-1 of segment n; valid until the next call.
func (c *segmentCache) chunks(id packID, n, from, to int) ([]byte, error) {
	key := segmentKey{id, n}
	if b, ok := c.segs[key]; ok {
		return cut(b, from, to)
	}
	p, err := c.packs.get(id)
	if err != nil {
		return nil, err
	}
	defer c.packs.put(p)
	if n >= len(p.segs) || !p.segs[n].alive(from, to) {
		return nil, damaged("pack %s: segment %d: chunks were dropped", id, n)
	}
	plain, err := c.scratch.read(p.pack, n)
	if err != nil {
		return nil, err
	}
	buf := make([]byte, 0, segmentSize)
	if len(c.order) == cachedSegments {
		buf = c.segs[c.order[0]][:0]
		delete(c.segs, c.order[0])
		c.order = c.order[1:]
	}
	c.order = append(c.order, key)
	c.segs[key] = append(buf, plain...)
	return cut(c.segs[key], from, to)
}

func cut(b []byte, from, to int) ([]byte, error) {
	if to*ChunkSize > len(b) {
		return nil, damaged("a segment is shorter than the list of files says")
	}
	return b[from*ChunkSize : to*ChunkSize], nil
}

// Import stores the checkpoint that Export wrote, under this host's key, with its id.
// accept sees what it is before any of its memory is read: it returns an error if it
// does not fit this host, and may change everything but the id (which kernel, say).
// As with Put: nil means that it is on stable storage, an error that nothing of it is.
// Cancelling ctx does not end a Read of r: close what is behind it.
// A malformed or cut stream is refused with INVALID. The peer can't make it take more
// memory than a Put.
//
// answer, if not nil, takes what Known.Ask is to return on the other side; without it a
// stream that asks is refused.
func (s *Store) Import(ctx context.Context, r io.Reader, accept func(*Meta) error, answer func([]byte) error) (Checkpoint, PutStats, error) {
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(moveMemory), zstd.WithDecoderMaxWindow(moveMemory))
	if err != nil {
		return Checkpoint{}, PutStats{}, notMoved(err)
	}
	defer z.Close()
	i := &importer{r: bufio.NewReaderSize(z, 64<<10), dirs: map[string]bool{}, answer: answer}
	meta, err := i.readHead()
	if err != nil {
		return Checkpoint{}, PutStats{}, notMoved(err)
	}
	id := meta.ID
	if err := accept(&meta); err != nil {
		return Checkpoint{}, PutStats{}, err
	}
	if meta.ID != id {
		return Checkpoint{}, PutStats{}, invalid("import checkpoint %s: its id can't change", id)
	}
	return s.put(ctx, meta, i.run)
}

func notMoved(err error) error {
	e := proto.Errorf(proto.CodeInvalid, "import a checkpoint: the stream is malformed or ended too early")
	e.Err = err
	return e
}

type importer struct {
	r       *bufio.Reader
	trees   []string
	dirs    map[string]bool
	entries uint64
	current *entry // a file that lacks left chunks
	left    int64
	block   *block
	answer  func([]byte) error
	asked   answered
}

var errStream = errors.New("malformed stream")

// bytes reads a length of at most limit and that many bytes.
func (i *importer) bytes(limit uint64) ([]byte, error) {
	n, err := binary.ReadUvarint(i.r)
	if err != nil {
		return nil, err
	}
	if n > limit {
		return nil, errStream
	}
	b := make([]byte, n)
	_, err = io.ReadFull(i.r, b)
	return b, err
}

func (i *importer) readHead() (Meta, error) {
	magic := make([]byte, len(moveMagic))
	if _, err := io.ReadFull(i.r, magic); err != nil {
		return Meta{}, err
	}
	if string(magic) != moveMagic {
		return Meta{}, errStream
	}
	b, err := i.bytes(maxMeta)
	if err != nil {
		return Meta{}, err
	}
	var c Checkpoint
	if err := json.Unmarshal(b, &c); err != nil {
		return Meta{}, err
	}
	n, err := binary.ReadUvarint(i.r)
	if err != nil || n == 0 || n > maxTrees {
		return Meta{}, errStream
	}
	head := binary.AppendUvarint(nil, n)
	for range n {
		name, err := i.bytes(64)
		if err != nil {
			return Meta{}, err
		}
		head = appendString(head, string(name))
	}
	d := &decoder{b: head}
	i.trees = d.trees()
	return c.Meta, d.err
}

// run feeds the stream into the pipeline.
func (i *importer) run(ctx context.Context, p *putter) error {
	p.manifest.trees = i.trees
	// Not before the pipeline has taken them is anything let go that was said to be here.
	defer func() { p.letGo = func() { i.unpin(p.o) } }()
	for {
		letter, err := i.r.ReadByte()
		if err != nil {
			return notMoved(err)
		}
		switch letter {
		case 'E':
			err = i.readEntry(ctx, p)
		case 'Z':
			err = i.readZeros(ctx, p)
		case 'D':
			err = i.readChunks(ctx, p)
		case 'Q':
			err = i.question(p)
		case 'K':
			err = i.readKnown(ctx, p)
		case 'X':
			return i.readEnd(ctx, p)
		default:
			err = errStream
		}
		if err != nil {
			return i.failed(ctx, err)
		}
	}
}

// failed tells a bad stream from a Put that failed.
func (i *importer) failed(ctx context.Context, err error) error {
	var perr *proto.Error
	if ctx.Err() != nil || errors.As(err, &perr) {
		return err
	}
	return notMoved(err)
}

func (i *importer) readEntry(ctx context.Context, p *putter) error {
	if err := i.flush(ctx, p); err != nil {
		return err
	}
	b, err := i.bytes(4 * maxPath)
	if err != nil {
		return err
	}
	if i.left != 0 || i.entries >= maxEntries {
		return errStream
	}
	d := &decoder{b: b}
	e := d.entry(i.trees, i.dirs)
	if d.err != nil || len(d.b) != 0 {
		return fmt.Errorf("%w: %w", errStream, d.err)
	}
	i.entries++
	i.current, i.left = nil, 0
	if e.kind == kindFile {
		i.current, i.left = e, chunksOf(e.size)
	}
	return p.begin(ctx, e)
}

// count reads a number between 1 and limit.
func (i *importer) count(limit uint64) (int64, error) {
	n, err := binary.ReadUvarint(i.r)
	if err == nil && (n == 0 || n > limit) {
		err = errStream
	}
	return int64(n), err
}

// take counts n chunks of the current file.
func (i *importer) take(limit uint64) (int64, error) {
	n, err := i.count(limit)
	if err == nil && n > i.left {
		err = errStream
	}
	i.left -= n
	return n, err
}

func (i *importer) readZeros(ctx context.Context, p *putter) error {
	n, err := i.take(maxFileSize / ChunkSize)
	if err != nil {
		return err
	}
	if err := i.flush(ctx, p); err != nil {
		return err
	}
	return p.hole(ctx, i.current, n)
}

func (i *importer) readChunks(ctx context.Context, p *putter) error {
	n, err := i.take(blockChunks)
	if err != nil {
		return err
	}
	if i.asked.at < len(i.asked.places) {
		if i.asked.at += int(n); i.asked.at > len(i.asked.places) {
			return errStream
		}
	}
	for ; n > 0; n-- {
		if i.block == nil {
			if i.block, err = p.freeBlock(ctx); err != nil {
				return err
			}
			i.block.chunks = 0
		}
		at := i.block.buf[i.block.chunks*ChunkSize:][:ChunkSize]
		if _, err := io.ReadFull(i.r, at); err != nil {
			return err
		}
		if i.left == 0 && n == 1 { // the padding of a file's last chunk is zero
			if tail := int(i.current.size % ChunkSize); tail > 0 && !bytes.Equal(at[tail:], zeroChunk[tail:]) {
				return errStream
			}
		}
		if i.block.chunks++; i.block.chunks == blockChunks {
			if err := i.flush(ctx, p); err != nil {
				return err
			}
		}
	}
	return nil
}

// flush hands over the chunks gathered so far.
func (i *importer) flush(ctx context.Context, p *putter) error {
	b := i.block
	if b == nil {
		return nil
	}
	i.block = nil
	return p.chunks(ctx, i.current, b)
}

func (i *importer) readEnd(ctx context.Context, p *putter) error {
	if err := i.flush(ctx, p); err != nil {
		return err
	}
	n, err := binary.ReadUvarint(i.r)
	if err != nil || n != i.entries || i.left != 0 {
		return notMoved(errStream)
	}
	if _, err := i.r.ReadByte(); err != io.EOF { // also reads the stream's checksum
		return notMoved(errStream)
	}
	return nil
}
