package pagestore

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// RestoreStats say what writing a checkpoint out took.
type RestoreStats struct {
	Size     int64         // bytes of all files, holes included
	Read     int64         // bytes read from packs
	Unpacked int64         // bytes of the segments read, unsealed and decompressed
	Files    int           // files, directories and links
	Duration time.Duration // all of it
}

// Restore writes a checkpoint's trees into dirs, by name: every tree of the
// checkpoint needs its directory, which must exist and be empty; one whose directory is ""
// is left out. Everything is
// authenticated before it is written; after an error the directories are empty
// again, and the error (INTERNAL, wrapping ErrDamaged) names checkpoint and chunks.
//
// Modes, owners and times are as they were stored. Zeros become holes. Nothing is
// synced: a restored directory is for CRIU, at once. On a tmpfs mounted with
// huge=always it is written fastest.
func (s *Store) Restore(ctx context.Context, id ID, dirs map[string]string) (RestoreStats, error) {
	start := time.Now()
	if err := s.enter(); err != nil {
		return RestoreStats{}, inCheckpoint("restore", id, err)
	}
	defer s.busy.Done()
	o, rec, done, err := s.read(id)
	if err != nil {
		return RestoreStats{}, err
	}
	defer done()
	m, err := o.loadFiles(&rec)
	if err != nil {
		return RestoreStats{}, inCheckpoint("restore", id, err)
	}
	r := &restorer{o: o, m: m, packs: newPackCache(o)}
	defer r.packs.close()
	if err := r.openRoots(dirs); err != nil {
		r.closeRoots()
		return RestoreStats{}, inCheckpoint("restore", id, err)
	}
	defer r.closeRoots()
	if err := r.run(ctx); err != nil {
		r.empty()
		return RestoreStats{}, inCheckpoint("restore", id, err)
	}
	return RestoreStats{
		Size: rec.Size, Read: r.read.Load(), Unpacked: r.unpacked.Load(), Files: len(m.entries), Duration: time.Since(start),
	}, nil
}

type restorer struct {
	o     *orgStore
	m     *manifest
	roots []*os.Root // by tree; nil: left out
	packs *packCache

	read, unpacked atomic.Int64
}

func (r *restorer) openRoots(dirs map[string]string) error {
	for _, name := range r.m.trees {
		dir, ok := dirs[name]
		if !ok {
			return invalid("no directory given for its tree %q", name)
		}
		if dir == "" {
			r.roots = append(r.roots, nil)
			continue
		}
		root, err := os.OpenRoot(dir)
		if err != nil {
			return err
		}
		r.roots = append(r.roots, root)
		f, err := root.Open(".")
		if err != nil {
			return err
		}
		_, err = f.Readdirnames(1)
		f.Close() //nolint:errcheck // only read
		if err == nil {
			return invalid("%s is not empty: restore into an empty directory", dir)
		}
		if err != io.EOF {
			return err
		}
	}
	return nil
}

func (r *restorer) closeRoots() {
	for _, root := range r.roots {
		if root != nil {
			root.Close() //nolint:errcheck // nothing is written through it any more
		}
	}
}

// empty removes what was written.
func (r *restorer) empty() {
	for _, root := range r.roots {
		if root == nil {
			continue
		}
		list, err := fs.ReadDir(root.FS(), ".")
		if err != nil {
			continue
		}
		for _, e := range list {
			root.RemoveAll(e.Name()) //nolint:errcheck // the caller gets the first error
		}
	}
}

// openAtOnce bounds the files that are being written together.
const openAtOnce = 128

func (r *restorer) run(ctx context.Context) error {
	w := &writeBatch{r: r}
	defer w.close()
	for _, e := range r.m.entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if r.roots[e.tree] == nil {
			continue
		}
		if err := r.make(w, e); err != nil {
			return fmt.Errorf("%s: %w", e.path, err)
		}
		if len(w.files) == openAtOnce {
			if err := w.flush(ctx); err != nil {
				return err
			}
		}
	}
	if err := w.flush(ctx); err != nil {
		return err
	}
	// Directories last, the deepest first: they may forbid writing, and their times
	// change with what is made in them.
	for _, e := range slices.Backward(r.m.entries) {
		if e.kind == kindDir && r.roots[e.tree] != nil {
			if err := r.finish(e); err != nil {
				return fmt.Errorf("%s: %w", e.path, err)
			}
		}
	}
	return nil
}

// make creates an entry; files are opened and their chunks noted.
func (r *restorer) make(w *writeBatch, e *entry) error {
	root := r.roots[e.tree]
	switch e.kind {
	case kindDir:
		if e.path == "." {
			return nil
		}
		return root.Mkdir(e.path, 0o700)
	case kindSymlink:
		if err := root.Symlink(e.link, e.path); err != nil {
			return err
		}
		return r.chown(e)
	case kindFIFO:
		dir, err := root.Open(path.Dir(e.path))
		if err != nil {
			return err
		}
		defer dir.Close() //nolint:errcheck // only a handle
		if err := unix.Mkfifoat(int(dir.Fd()), path.Base(e.path), 0o600); err != nil {
			return err
		}
		return r.finish(e)
	default:
		f, err := root.OpenFile(e.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		return w.add(f, e)
	}
}

// chown gives an entry its owner, unless it has it already: so the store works
// without privileges on files of one's own.
func (r *restorer) chown(e *entry) error {
	if int(e.uid) == os.Geteuid() && int(e.gid) == os.Getegid() {
		return nil
	}
	return r.roots[e.tree].Lchown(e.path, int(e.uid), int(e.gid))
}

// finish sets owner, mode and times of what is no link; the owner first, since a
// change of owner clears setuid.
func (r *restorer) finish(e *entry) error {
	if err := r.chown(e); err != nil {
		return err
	}
	root := r.roots[e.tree]
	if err := root.Chmod(e.path, fileMode(e.mode)); err != nil {
		return err
	}
	t := time.Unix(0, e.mtime)
	return root.Chtimes(e.path, t, t)
}

func fileMode(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	if mode&0o4000 != 0 {
		m |= fs.ModeSetuid
	}
	if mode&0o2000 != 0 {
		m |= fs.ModeSetgid
	}
	if mode&0o1000 != 0 {
		m |= fs.ModeSticky
	}
	return m
}

// piece is a row of chunks within one segment, and where they go. 16 bytes.
type piece struct {
	pack  uint32 // in manifest.packs
	first uint32 // chunk in its pack
	at    uint32 // chunk of the file: maxFileSize is 2^30 chunks
	count uint8  // 1 to segmentChunks
	file  uint8  // in writeBatch.files
}

func (p *piece) offset() int64 { return int64(p.at) * ChunkSize }

// writeBatch are files that are written together, in the order of packs, so that
// each segment is read once.
type writeBatch struct {
	r      *restorer
	files  []*os.File
	which  []*entry
	pieces []piece
}

func (w *writeBatch) add(f *os.File, e *entry) error {
	file := uint8(len(w.files))
	w.files, w.which = append(w.files, f), append(w.which, e)
	if err := f.Truncate(e.size); err != nil {
		return err
	}
	at := int64(0)
	for _, run := range e.runs {
		if run.pack == zeroPack {
			at += int64(run.count)
			continue
		}
		for first, left := run.first, run.count; left > 0; {
			n := min(left, segmentChunks-first%segmentChunks)
			w.pieces = append(w.pieces, piece{
				pack: run.pack, first: first, count: uint8(n), file: file, at: uint32(at),
			})
			first, left, at = first+n, left-n, at+int64(n)
		}
	}
	return nil
}

func (w *writeBatch) close() {
	for _, f := range w.files {
		f.Close() //nolint:errcheck // closed by flush, or of no use any more
	}
	w.files, w.which, w.pieces = w.files[:0], w.which[:0], w.pieces[:0]
}

// flush writes all files of the batch and closes them.
func (w *writeBatch) flush(ctx context.Context) error {
	slices.SortFunc(w.pieces, func(a, b piece) int {
		return cmp.Or(cmp.Compare(a.pack, b.pack), cmp.Compare(a.first, b.first))
	})
	var mu sync.Mutex // guards next
	next := 0
	take := func() []piece { // the pieces of one segment
		mu.Lock()
		defer mu.Unlock()
		from, to := next, next
		for to < len(w.pieces) && w.pieces[to].pack == w.pieces[from].pack &&
			w.pieces[to].first/segmentChunks == w.pieces[from].first/segmentChunks {
			to++
		}
		next = to
		return w.pieces[from:to]
	}
	g, ctx := errgroup.WithContext(ctx)
	for range min(w.r.o.store.opts.Workers, 1+len(w.pieces)/8) {
		g.Go(func() error {
			s := newScratch()
			defer s.close()
			for {
				part := take()
				if len(part) == 0 {
					return nil
				}
				if err := ctx.Err(); err != nil {
					return err
				}
				if err := w.write(s, part); err != nil {
					return err
				}
			}
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i, f := range w.files {
		if err := f.Close(); err != nil {
			return err
		}
		if err := w.r.finish(w.which[i]); err != nil {
			return fmt.Errorf("%s: %w", w.which[i].path, err)
		}
	}
	w.close()
	return nil
}

// write reads one segment and writes all pieces of it.
func (w *writeBatch) write(s *scratch, part []piece) error {
	p, err := w.r.packs.get(w.r.m.packs[part[0].pack])
	if err != nil {
		return err
	}
	defer w.r.packs.put(p)
	n := int(part[0].first / segmentChunks)
	plain, err := s.read(p.pack, n)
	if err != nil {
		return err
	}
	w.r.read.Add(int64(p.segs[n].stored))
	w.r.unpacked.Add(int64(len(plain)))
	for i := range part {
		if err := w.writePiece(p.pack, n, plain, &part[i]); err != nil {
			return err
		}
	}
	return nil
}

func (w *writeBatch) writePiece(p *pack, n int, plain []byte, c *piece) error {
	from := int(c.first % segmentChunks)
	to := from + int(c.count)
	if to > len(plain)/ChunkSize || !p.segs[n].alive(from, to) {
		return damaged("pack %s: chunks %d to %d were dropped", p.id, c.first, int(c.first)+int(c.count)-1)
	}
	off := c.offset()
	data := plain[from*ChunkSize : to*ChunkSize]
	if rest := w.which[c.file].size - off; int64(len(data)) > rest {
		data = data[:rest]
	}
	if _, err := w.files[c.file].WriteAt(data, off); err != nil {
		return err
	}
	return nil
}

// alive says whether chunks from to to-1 of a segment are there.
func (s *segment) alive(from, to int) bool {
	mask := ^uint64(0) >> (64 - (to - from)) << from
	return s.live&mask == mask
}

// packCache holds open packs, at most openPacks of them that nobody uses.
type packCache struct {
	o    *orgStore
	mu   sync.Mutex
	open map[packID]*cachedPack
	idle []*cachedPack // least recently used first
}

type cachedPack struct {
	*pack
	users int
}

const openPacks = 32

func newPackCache(o *orgStore) *packCache { return &packCache{o: o, open: map[packID]*cachedPack{}} }

// get opens a pack, or finds it open. The caller gives it back with put.
func (c *packCache) get(id packID) (*cachedPack, error) {
	c.mu.Lock()
	defer c.mu.Unlock() // held while opening: two table reads at once gain nothing
	p := c.open[id]
	if p == nil {
		opened, err := c.o.openPack(id)
		if err != nil {
			return nil, err
		}
		p = &cachedPack{pack: opened}
		c.open[id] = p
	} else if p.users == 0 {
		c.idle = slices.DeleteFunc(c.idle, func(q *cachedPack) bool { return q == p })
	}
	p.users++
	return p, nil
}

func (c *packCache) put(p *cachedPack) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p.users--; p.users > 0 {
		return
	}
	c.idle = append(c.idle, p)
	if len(c.idle) > openPacks {
		delete(c.open, c.idle[0].id)
		c.idle[0].close()
		c.idle = c.idle[1:]
	}
}

func (c *packCache) close() {
	for _, p := range c.open {
		p.close()
	}
}
