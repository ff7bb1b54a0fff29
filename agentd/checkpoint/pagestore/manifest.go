package pagestore

import (
	"encoding/binary"
	"fmt"
	"math"
	"path"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
)

const (
	filesMagic = "PSTFILE1"

	maxEntries  = 1 << 20   // files, directories and links in one checkpoint
	maxPath     = 4096      // bytes of a path
	maxFileSize = 1 << 42   // bytes of one file: 4 TiB
	maxFiles    = 256 << 20 // bytes of a .files file, before and after decompression
)

// entryKind is what an entry of a tree is.
type entryKind uint8

const (
	kindDir entryKind = iota
	kindFile
	kindSymlink
	kindFIFO
	kindEnd // no kind; those below are valid
)

// entry is a file, directory or link of a checkpoint.
type entry struct {
	tree  int    // index in manifest.trees
	path  string // slash-separated, "." for the tree's root; parents come first
	kind  entryKind
	mode  uint32 // permission bits with setuid, setgid, sticky: 0 to 07777
	uid   uint32
	gid   uint32
	mtime int64 // Unix nanoseconds
	size  int64 // bytes, of files
	link  string
	runs  []run // of files; together they hold ceil(size / ChunkSize) chunks
}

// run is a row of neighbouring chunks. 12 bytes.
type run struct {
	pack  uint32 // index in manifest.packs, or zeroPack
	first uint32 // number of the first chunk in its pack
	count uint32 // at least 1
}

// zeroPack stands for chunks of zeros, which are nowhere.
const zeroPack = math.MaxUint32

// maxRun is the most chunks one run holds.
const maxRun = math.MaxUint32

// manifest is the content of a .files file: what a checkpoint is made of.
type manifest struct {
	trees   []string
	packs   []packID
	entries []*entry
}

func chunksOf(size int64) int64 { return (size + ChunkSize - 1) / ChunkSize }

// addRun appends n chunks to a file, lengthening its last run if they follow it.
func (e *entry) addRun(r run) {
	if last := len(e.runs) - 1; last >= 0 {
		l := &e.runs[last]
		if l.pack == r.pack && (r.pack == zeroPack || l.first+l.count == r.first) && uint64(l.count)+uint64(r.count) <= maxRun {
			l.count += r.count
			return
		}
	}
	e.runs = append(e.runs, r)
}

// encode is the reverse of decodeManifest.
func (m *manifest) encode() ([]byte, error) {
	b := appendTrees(nil, m.trees)
	b = binary.AppendUvarint(b, uint64(len(m.packs)))
	for _, p := range m.packs {
		b = append(b, p[:]...)
	}
	b = binary.AppendUvarint(b, uint64(len(m.entries)))
	for _, e := range m.entries {
		b = appendEntry(b, e)
		if e.kind == kindFile {
			b = appendRuns(b, e.runs)
		}
	}
	if len(b) > maxFiles {
		return nil, invalid("its memory is too fragmented: the list of its pages would take %d MiB, the bound is %d", len(b)>>20, maxFiles>>20)
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer enc.Close() //nolint:errcheck // nothing is written through it
	return enc.EncodeAll(b, nil), nil
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func appendTrees(b []byte, trees []string) []byte {
	b = binary.AppendUvarint(b, uint64(len(trees)))
	for _, t := range trees {
		b = appendString(b, t)
	}
	return b
}

// appendEntry writes all of an entry but its runs.
func appendEntry(b []byte, e *entry) []byte {
	b = append(b, byte(e.kind))
	b = binary.AppendUvarint(b, uint64(e.tree))
	b = appendString(b, e.path)
	b = binary.AppendUvarint(b, uint64(e.mode))
	b = binary.AppendUvarint(b, uint64(e.uid))
	b = binary.AppendUvarint(b, uint64(e.gid))
	b = binary.AppendVarint(b, e.mtime)
	switch e.kind {
	case kindSymlink:
		b = appendString(b, e.link)
	case kindFile:
		b = binary.AppendUvarint(b, uint64(e.size))
	}
	return b
}

// appendRuns writes each run as its length, its pack + 1 (0 for zeros) and how far
// it starts from where the run before it ended.
func appendRuns(b []byte, runs []run) []byte {
	b = binary.AppendUvarint(b, uint64(len(runs)))
	next := int64(0)
	for _, r := range runs {
		b = binary.AppendUvarint(b, uint64(r.count))
		if r.pack == zeroPack {
			b = append(b, 0)
			continue
		}
		b = binary.AppendUvarint(b, uint64(r.pack)+1)
		b = binary.AppendVarint(b, int64(r.first)-next)
		next = int64(r.first) + int64(r.count)
	}
	return b
}

// decoder reads the fields of a manifest; after the first error all reads give zero.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) fail(what string) {
	if d.err == nil {
		d.err = fmt.Errorf("malformed list of files: %s", what)
	}
	d.b = nil
}

func (d *decoder) uvarint(limit uint64, what string) uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 || v > limit {
		d.fail(what)
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) varint(what string) int64 {
	v, n := binary.Varint(d.b)
	if n <= 0 {
		d.fail(what)
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) bytes(n uint64, what string) []byte {
	if n > uint64(len(d.b)) {
		d.fail(what)
		return nil
	}
	out := d.b[:n]
	d.b = d.b[n:]
	return out
}

func (d *decoder) str(limit uint64, what string) string {
	return string(d.bytes(d.uvarint(limit, what), what))
}

// decodeManifest reads what encode wrote, and checks every rule that readers rely
// on: paths stay within their tree and come after their parents, runs lie within a
// pack and add up to the file's size. packed is at most maxFiles bytes.
func decodeManifest(packed []byte) (*manifest, error) {
	plain, err := unpackManifest(packed)
	if err != nil {
		return nil, err
	}
	return parseManifest(plain)
}

func unpackManifest(packed []byte) ([]byte, error) {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxFiles))
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	plain, err := dec.DecodeAll(packed, nil)
	if err != nil {
		return nil, fmt.Errorf("malformed list of files: %w", err)
	}
	return plain, nil
}

func parseManifest(plain []byte) (*manifest, error) {
	d := &decoder{b: plain}
	m := &manifest{}
	m.trees = d.trees()
	for range d.uvarint(uint64(len(d.b)/len(packID{})), "number of packs") {
		var id packID
		copy(id[:], d.bytes(uint64(len(id)), "pack"))
		m.packs = append(m.packs, id)
	}
	dirs := map[string]bool{}
	for range d.uvarint(maxEntries, "number of entries") {
		e := d.entry(m.trees, dirs)
		if e.kind == kindFile {
			e.runs = d.runs(chunksOf(e.size), len(m.packs))
		}
		if d.err != nil {
			break
		}
		m.entries = append(m.entries, e)
	}
	if d.err == nil && len(d.b) != 0 {
		d.fail("more after its end")
	}
	return m, d.err
}

func (d *decoder) trees() (out []string) {
	for range d.uvarint(maxTrees, "number of trees") {
		name := d.str(maxPath, "tree")
		if !validTree(name) || slices.Contains(out, name) {
			d.fail("tree")
		}
		out = append(out, name)
	}
	return out
}

// entry reads one entry, without its runs. dirs holds the entries so far, true for
// directories.
func (d *decoder) entry(trees []string, dirs map[string]bool) *entry {
	e := &entry{}
	if k := d.bytes(1, "kind"); len(k) == 1 {
		e.kind = entryKind(k[0])
	}
	e.tree = int(d.uvarint(maxTrees, "tree"))
	e.path = d.str(maxPath, "path")
	e.mode = uint32(d.uvarint(0o7777, "mode"))
	e.uid = uint32(d.uvarint(math.MaxUint32, "owner"))
	e.gid = uint32(d.uvarint(math.MaxUint32, "group"))
	e.mtime = d.varint("time")
	if e.kind >= kindEnd || e.tree >= len(trees) {
		d.fail("kind or tree")
		return e
	}
	key := trees[e.tree] + "/" + e.path
	if _, twice := dirs[key]; twice || !validPath(e.path) {
		d.fail("path")
		return e
	}
	if e.path == "." {
		if e.kind != kindDir {
			d.fail("root")
		}
	} else if !dirs[trees[e.tree]+"/"+path.Dir(e.path)] {
		d.fail("path without its directory")
	}
	dirs[key] = e.kind == kindDir
	switch e.kind {
	case kindSymlink:
		e.link = d.str(maxPath, "link")
		if e.link == "" || strings.ContainsRune(e.link, 0) {
			d.fail("link")
		}
	case kindFile:
		e.size = int64(d.uvarint(maxFileSize, "size"))
	}
	return e
}

func (d *decoder) runs(chunks int64, packs int) []run {
	n := d.uvarint(uint64(len(d.b)), "number of runs") // a run takes two bytes or more
	runs := make([]run, 0, n)
	next := int64(0)
	for range n {
		r := run{count: uint32(d.uvarint(maxRun, "run"))}
		p := d.uvarint(uint64(packs), "pack")
		if p == 0 {
			r.pack = zeroPack
		} else {
			first := next + d.varint("run")
			r.pack = uint32(p - 1)
			if first < 0 || first+int64(r.count) > packChunks {
				d.fail("run outside its pack")
			}
			r.first = uint32(first)
			next = first + int64(r.count)
		}
		chunks -= int64(r.count)
		if r.count == 0 || chunks < 0 {
			d.fail("run")
		}
		if d.err != nil {
			return nil
		}
		runs = append(runs, r)
	}
	if chunks != 0 {
		d.fail("runs do not fill the file")
	}
	return runs
}

// maxTrees bounds the trees of a checkpoint.
const maxTrees = 16

func validTree(name string) bool {
	if name == "" || len(name) > 64 {
		return false
	}
	for _, c := range name {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// validPath: relative, clean, without "..", as fs.ValidPath, but any bytes.
func validPath(p string) bool {
	return p != "" && len(p) <= maxPath && !strings.ContainsRune(p, 0) &&
		path.Clean(p) == p && p[0] != '/' && p != ".." && !strings.HasPrefix(p, "../")
}
