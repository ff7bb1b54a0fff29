package pagestore

import (
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// ChunkSize is the size of a chunk in bytes, before compression.
const ChunkSize = 4096

const (
	// segmentChunks is how many chunks are compressed together: 16 store up to 5 % more
	// than 64, and a restore that needs one chunk unpacks a quarter as much.
	segmentChunks = 32
	segmentSize   = segmentChunks * ChunkSize
	packSegments  = 512
	packChunks    = packSegments * segmentChunks // 64 MiB of memory

	packMagic  = "PSTPACK1"
	packHead   = len(packMagic) + 32 // magic, salt; with the magic's other form the salt begins with the key's id
	packTail   = 4 + 4 + len(packMagic)
	sealedMore = 16 // what GCM adds

	// Nonces of a pack's key: the segments' numbers, and these.
	nonceTable  = 1 << 32
	nonceHashes = 1<<32 + 1

	tmpPrefix  = ".tmp-"
	packSuffix = ".pack"
)

// codec is how a segment's chunks are packed before they are sealed.
type codec uint8

const (
	codecRaw  codec = iota // as they are
	codecLZ4               // one LZ4 block: what Put writes, since restores wait for it
	codecZstd              // one zstd frame: what Collect writes
	codecGone              // no chunk of it is alive; nothing is stored
)

// packID names a pack within its organization.
type packID [16]byte

// String is the pack's name on disk, 32 hexadecimal digits.
func (id packID) String() string { return hex.EncodeToString(id[:]) }

// newPackID returns 48 bits of Unix milliseconds, then 80 random bits: newer packs
// sort behind older ones.
func newPackID() (id packID) {
	binary.BigEndian.PutUint64(id[:], uint64(time.Now().UnixMilli())<<16)
	if _, err := rand.Read(id[6:]); err != nil {
		panic(err) // never happens: crypto/rand aborts the program itself
	}
	return id
}

func parsePackName(name string) (id packID, ok bool) {
	if len(name) != 2*len(id)+len(packSuffix) || name[2*len(id):] != packSuffix {
		return id, false
	}
	_, err := hex.Decode(id[:], []byte(name[:2*len(id)]))
	return id, err == nil && id.String() == name[:2*len(id)]
}

// segment is a row of a pack's table.
type segment struct {
	codec  codec
	chunks uint8  // 1 to segmentChunks
	stored uint32 // bytes in the file, seal included
	live   uint64 // bit i: chunk i is there
	offset int64  // in the file; not stored, the sum of those before
}

// tableRow is the size of a segment's row in the sealed table: codec, chunks,
// stored, live.
const tableRow = 1 + 1 + 4 + 8

// packWriter writes one pack: segments in order, then finish or abort. Segment
// numbers are given out by reserve, so that segments can be sealed by several
// goroutines. Not for concurrent use but for sealing with aead.
type packWriter struct {
	id     packID
	key    keyID // of the ring
	fs     fileSystem
	dir    string
	f      file
	aead   cipher.AEAD
	off    int64
	segs   []segment
	hashes []chunkHash
}

func (o *orgStore) newPack(id packID) (*packWriter, error) {
	var salt [32]byte
	if _, err := rand.Read(salt[:]); err != nil {
		return nil, err
	}
	k, magic := o.keyset().newest, packMagic
	if !k.first {
		magic = named(packMagic)
		copy(salt[:], k.id[:])
	}
	aead, err := k.packKey(id, salt[:])
	if err != nil {
		return nil, err
	}
	w := &packWriter{id: id, key: k.id, fs: o.fs, dir: o.packDir(), aead: aead}
	if w.f, err = w.fs.create(w.tmp()); err != nil {
		return nil, err
	}
	if err := w.write(append([]byte(magic), salt[:]...)); err != nil {
		w.abort()
		return nil, err
	}
	return w, nil
}

func (w *packWriter) tmp() string   { return filepath.Join(w.dir, tmpPrefix+w.id.String()+packSuffix) }
func (w *packWriter) final() string { return filepath.Join(w.dir, w.id.String()+packSuffix) }

func (w *packWriter) write(b []byte) error {
	n, err := w.f.Write(b)
	w.off += int64(n)
	return err
}

// add writes a sealed segment, the next by number.
func (w *packWriter) add(c codec, sealed []byte, hashes []chunkHash) error {
	seg := segment{codec: c, chunks: uint8(len(hashes)), stored: uint32(len(sealed)), offset: w.off}
	for i, h := range hashes {
		if h != deadChunk {
			seg.live |= 1 << i
		}
	}
	w.segs = append(w.segs, seg)
	w.hashes = append(w.hashes, hashes...)
	return w.write(sealed)
}

// finish writes table, hashes and trailer, syncs and renames; the caller syncs the
// directory. It returns the file's size. After an error nothing is left.
func (w *packWriter) finish() (int64, error) {
	err := w.write(w.footer())
	if err == nil {
		err = w.f.Sync()
	}
	if cerr := w.f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = w.fs.rename(w.tmp(), w.final())
	}
	if err != nil {
		w.fs.remove(w.tmp()) //nolint:errcheck // the next Open removes it
		return 0, err
	}
	return w.off, nil
}

func (w *packWriter) footer() []byte {
	table := make([]byte, 0, len(w.segs)*tableRow)
	for _, s := range w.segs {
		table = append(table, byte(s.codec), s.chunks)
		table = binary.BigEndian.AppendUint32(table, s.stored)
		table = binary.BigEndian.AppendUint64(table, s.live)
	}
	hashes := make([]byte, 0, len(w.hashes)*len(chunkHash{}))
	for _, h := range w.hashes {
		hashes = append(hashes, h[:]...)
	}
	out := w.aead.Seal(nil, counterNonce(nonceTable), table, []byte(packMagic))
	out = w.aead.Seal(out, counterNonce(nonceHashes), hashes, []byte(packMagic))
	out = binary.BigEndian.AppendUint32(out, uint32(len(table)+sealedMore))
	out = binary.BigEndian.AppendUint32(out, uint32(len(hashes)+sealedMore))
	return append(out, packMagic...)
}

// abort removes what was written.
func (w *packWriter) abort() {
	w.f.Close()          //nolint:errcheck // it goes
	w.fs.remove(w.tmp()) //nolint:errcheck // the next Open removes it
}

// pack is an open pack file: its own file handle and the table that belongs to it,
// so it stays readable when the pack is rewritten or deleted. Safe for concurrent
// use.
type pack struct {
	id     packID
	key    keyID // of the ring
	f      file
	aead   cipher.AEAD
	segs   []segment
	chunks int

	hashesAt  int64
	hashesLen int
}

// openPack reads and authenticates a pack's table. The caller closes it.
func (o *orgStore) openPack(id packID) (*pack, error) {
	for {
		set := o.keyset()
		p, err := o.openPackWith(set, id)
		if errors.Is(err, errNoKey) && o.keyset() != set {
			continue // it was sealed anew meanwhile
		}
		return p, err
	}
}

func (o *orgStore) openPackWith(set *keyset, id packID) (*pack, error) {
	f, err := o.fs.open(filepath.Join(o.packDir(), id.String()+packSuffix))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, damaged("pack %s is missing", id)
		}
		return nil, err
	}
	p := &pack{id: id, f: f}
	if err := p.readTable(set); err != nil {
		f.Close() //nolint:errcheck // only read
		return nil, err
	}
	return p, nil
}

func (p *pack) close() { p.f.Close() } //nolint:errcheck // only read

// maxTable and maxHashes bound what is read before it is authenticated.
const (
	maxTable  = packSegments*tableRow + sealedMore
	maxHashes = packChunks*16 + sealedMore
)

func (p *pack) readTable(set *keyset) error {
	size, err := p.f.size()
	if err != nil {
		return err
	}
	if size < int64(packHead+packTail) {
		return damaged("pack %s is cut short", p.id)
	}
	head, tail := make([]byte, packHead), make([]byte, packTail)
	if err := readAt(p.f, head, 0); err != nil {
		return err
	}
	if err := readAt(p.f, tail, size-int64(packTail)); err != nil {
		return err
	}
	tableLen, hashesLen := int64(binary.BigEndian.Uint32(tail)), int64(binary.BigEndian.Uint32(tail[4:]))
	key, bears, _, ok := sealedBy(packMagic, head)
	if !ok || string(tail[8:]) != packMagic ||
		tableLen < sealedMore || tableLen > maxTable || hashesLen < sealedMore || hashesLen > maxHashes {
		return damaged("pack %s has no valid header or trailer", p.id)
	}
	p.hashesLen = int(hashesLen)
	p.hashesAt = size - int64(packTail) - hashesLen
	tableAt := p.hashesAt - tableLen
	if tableAt < int64(packHead) {
		return damaged("pack %s is cut short", p.id)
	}
	k := set.of(key, bears)
	if k == nil {
		return noKey(fmt.Sprintf("pack %s", p.id), key)
	}
	p.key = k.id
	if p.aead, err = k.packKey(p.id, head[len(packMagic):]); err != nil {
		return err
	}
	sealed := make([]byte, tableLen)
	if err := readAt(p.f, sealed, tableAt); err != nil {
		return err
	}
	table, err := p.aead.Open(sealed[:0], counterNonce(nonceTable), sealed, []byte(packMagic))
	if err != nil {
		return damaged("pack %s: its table does not authenticate", p.id)
	}
	return p.parseTable(table, tableAt)
}

// parseTable reads the rows of a table, whose segments must fill the file from its
// header to end.
func (p *pack) parseTable(table []byte, end int64) error {
	if len(table)%tableRow != 0 {
		return damaged("pack %s: its table is malformed", p.id)
	}
	off := int64(packHead)
	for i := 0; i < len(table); i += tableRow {
		s := segment{codec: codec(table[i]), chunks: table[i+1], stored: binary.BigEndian.Uint32(table[i+2:]), live: binary.BigEndian.Uint64(table[i+6:]), offset: off}
		last := i+tableRow == len(table)
		// All but the last segment are full: a chunk's segment is its number / segmentChunks.
		if s.codec > codecGone || s.chunks == 0 || s.chunks > segmentChunks || (!last && s.chunks != segmentChunks) ||
			s.live>>s.chunks != 0 || s.stored > segmentSize+sealedMore || (s.codec == codecGone) != (s.stored == 0) || (s.codec == codecGone) != (s.live == 0) || (s.stored != 0 && s.stored < sealedMore) {
			return damaged("pack %s: its table is malformed", p.id)
		}
		off += int64(s.stored)
		p.segs = append(p.segs, s)
		p.chunks += int(s.chunks)
	}
	if off != end || len(p.segs) > packSegments || p.hashesLen != p.chunks*len(chunkHash{})+sealedMore {
		return damaged("pack %s: its table does not fit the file", p.id)
	}
	return nil
}

// readHashes returns the hash of every chunk; deadChunk for those dropped.
func (p *pack) readHashes() ([]chunkHash, error) {
	sealed := make([]byte, p.hashesLen)
	if err := readAt(p.f, sealed, p.hashesAt); err != nil {
		return nil, err
	}
	plain, err := p.aead.Open(sealed[:0], counterNonce(nonceHashes), sealed, []byte(packMagic))
	if err != nil {
		return nil, damaged("pack %s: its list of hashes does not authenticate", p.id)
	}
	out := make([]chunkHash, p.chunks)
	for i := range out {
		copy(out[i][:], plain[i*len(chunkHash{}):])
	}
	return out, nil
}

// scratch are the buffers of one worker that reads or seals segments.
type scratch struct {
	sealed []byte // a segment as it is in the file
	plain  []byte // its chunks, or those packed
	lz4    lz4.Compressor
	enc    *zstd.Encoder // nil until it is needed
	dec    *zstd.Decoder // nil until it is needed
}

func newScratch() *scratch {
	return &scratch{
		sealed: make([]byte, 0, segmentSize+sealedMore),
		// With room for more than a block after the last one, zstd decodes without
		// looking at the buffer's end at each step.
		plain: make([]byte, 0, segmentSize+160<<10),
	}
}

func (s *scratch) close() {
	if s.enc != nil {
		s.enc.Close() //nolint:errcheck // nothing is written through it
	}
	if s.dec != nil {
		s.dec.Close()
	}
}

// pack compresses plain with c where that saves an eighth or more, and appends it to
// dst, sealed as segment number n.
func (s *scratch) pack(dst []byte, c codec, aead cipher.AEAD, n int, plain []byte) (codec, []byte, error) {
	body, most := plain, len(plain)-len(plain)/8
	switch c {
	case codecLZ4:
		packed := s.plain[:most]
		switch n, err := s.lz4.CompressBlock(plain, packed); {
		case err != nil && !errors.Is(err, lz4.ErrInvalidSourceShortBuffer):
			return c, nil, err
		case err == nil && n > 0:
			body = packed[:n]
		}
	case codecZstd:
		if s.enc == nil {
			var err error
			if s.enc, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderConcurrency(1),
				zstd.WithWindowSize(segmentSize), zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true)); err != nil {
				return c, nil, err
			}
		}
		if packed := s.enc.EncodeAll(plain, s.plain[:0]); len(packed) <= most {
			body = packed
		}
	}
	if len(body) == len(plain) {
		c = codecRaw
	}
	return c, aead.Seal(dst, counterNonce(uint64(n)), body, []byte{byte(c)}), nil
}

// unpack is the reverse of what pack did before sealing. The result is body itself or
// valid until the next call.
func (s *scratch) unpack(c codec, body []byte, chunks int) (out []byte, err error) {
	switch c {
	case codecLZ4:
		out = s.plain[:chunks*ChunkSize]
		n, err := lz4.UncompressBlock(body, out)
		return out[:max(n, 0)], err
	case codecZstd:
		if s.dec == nil {
			if s.dec, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(segmentSize), zstd.WithDecoderLowmem(true)); err != nil {
				return nil, err
			}
		}
		return s.dec.DecodeAll(body, s.plain[:0])
	}
	return body, nil
}

// read returns the chunks of segment n, authenticated; valid until the next call.
func (s *scratch) read(p *pack, n int) ([]byte, error) {
	seg := p.segs[n]
	if seg.codec == codecGone {
		return nil, damaged("pack %s: segment %d was dropped", p.id, n)
	}
	if cap(s.sealed) < int(seg.stored) {
		s.sealed = make([]byte, 0, segmentSize+sealedMore)
	}
	sealed := s.sealed[:seg.stored]
	if err := readAt(p.f, sealed, seg.offset); err != nil {
		return nil, err
	}
	body, err := p.aead.Open(sealed[:0], counterNonce(uint64(n)), sealed, []byte{byte(seg.codec)})
	if err != nil {
		return nil, damaged("pack %s: segment %d does not authenticate", p.id, n)
	}
	if body, err = s.unpack(seg.codec, body, int(seg.chunks)); err != nil {
		return nil, damaged("pack %s: segment %d does not decompress", p.id, n)
	}
	if len(body) != int(seg.chunks)*ChunkSize {
		return nil, damaged("pack %s: segment %d has the wrong size", p.id, n)
	}
	return body, nil
}

// readAt fills b from off; a file that ends before is damaged.
func readAt(f file, b []byte, off int64) error {
	if len(b) == 0 {
		return nil
	}
	n, err := f.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == io.EOF {
		return damaged("a file ends before its time")
	}
	return fmt.Errorf("read a pack: %w", err)
}
