package bucketfs

import (
	"bytes"
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/postern-dev/postern/agentd/attach/bucket"
)

const (
	cacheDir = "cache"
	// chunkSize is how much of an object is fetched at once, in bytes.
	chunkSize = 1 << 20
	// maxAhead bounds how many chunks a reader is ahead of, and maxFetches how many are fetched
	// ahead at once by all.
	maxAhead   = 16
	maxFetches = 16
	// maxChunks bounds the chunks in the cache, whose index takes about 200 bytes each.
	maxChunks = 200_000
	// overhead is what a chunk takes at least, on disk.
	overhead = 4096
)

// chunkID names a chunk: the version of an object, and which.
type chunkID struct {
	version string // hex
	n       int64
}

func versionOf(o bucket.Object) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d:%s%s", len(o.Key), o.Key, o.ETag))
	return hex.EncodeToString(sum[:16])
}

// cached is a chunk on disk.
type cached struct {
	id    chunkID
	bytes int64
	// sound: this process wrote it, or has checked it.
	sound bool
}

// cache keeps chunks on disk, the ones used last.
type cache struct {
	dir   string
	max   int64
	fetch func(ctx context.Context, o bucket.Object, off, n int64, w io.Writer) error

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	room   chan struct{} // fetches ahead

	mu    sync.Mutex
	used  int64
	order *list.List // of *cached, the one used last in front
	known map[chunkID]*list.Element
	under map[chunkID]*flight
}

// flight is a fetch under way; err may be read when done is closed.
type flight struct {
	done chan struct{}
	err  error
}

func openCache(dir string, maxBytes int64, fetch func(context.Context, bucket.Object, int64, int64, io.Writer) error) (*cache, error) {
	c := &cache{
		dir: dir, max: maxBytes, fetch: fetch, room: make(chan struct{}, maxFetches),
		order: list.New(), known: map[chunkID]*list.Element{}, under: map[chunkID]*flight{},
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return c, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		version, n, ok := strings.Cut(e.Name(), "-")
		number, nerr := strconv.ParseInt(n, 10, 64)
		info, serr := e.Info()
		if !ok || nerr != nil || serr != nil || len(version) != 32 || !info.Mode().IsRegular() || len(c.known) >= maxChunks {
			return os.Remove(path) // half written, or not ours
		}
		c.addLocked(&cached{id: chunkID{version, number}, bytes: max(info.Size(), overhead)})
		return nil
	})
}

func (c *cache) close() { c.cancel(); c.wg.Wait() }

func (c *cache) size() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.used
}

func (c *cache) path(id chunkID) string {
	return filepath.Join(c.dir, id.version[:2], id.version+"-"+strconv.FormatInt(id.n, 10))
}

func (c *cache) addLocked(e *cached) {
	c.known[e.id] = c.order.PushFront(e)
	c.used += e.bytes
}

// shrinkLocked makes room; it returns what must be removed from disk.
func (c *cache) shrinkLocked() (out []string) {
	for c.used > c.max && c.order.Len() > 1 || len(c.known) > maxChunks {
		out = append(out, c.path(c.dropLocked(c.order.Back())))
	}
	return out
}

func (c *cache) dropLocked(at *list.Element) chunkID {
	e := c.order.Remove(at).(*cached)
	c.used -= e.bytes
	delete(c.known, e.id)
	return e.id
}

// read fills buf from off on, as far as the object goes.
func (c *cache) read(ctx context.Context, o bucket.Object, off int64, buf []byte) (int, error) {
	if off >= o.Size {
		return 0, nil
	}
	buf = buf[:min(int64(len(buf)), o.Size-off)]
	version, done := versionOf(o), 0
	for done < len(buf) {
		at := off + int64(done)
		id := chunkID{version, at / chunkSize}
		part := buf[done:min(len(buf), done+int(chunkSize-at%chunkSize))]
		if err := c.chunk(ctx, o, id, at%chunkSize, part); err != nil {
			return done, err
		}
		done += len(part)
	}
	return done, nil
}

// chunk reads a part of a chunk, which is fetched if it is not here, or is damaged.
func (c *cache) chunk(ctx context.Context, o bucket.Object, id chunkID, off int64, buf []byte) error {
	for try := 0; ; try++ {
		if c.have(id, o, off, buf) {
			return nil
		}
		if try == 8 {
			return errors.New("the cache is too small for what is read at once")
		}
		err := c.get(ctx, o, id)
		var disk *os.PathError
		if errors.As(err, &disk) {
			// The disk is full, or worse: what is asked for is read past it.
			to := &fill{buf: buf}
			return c.fetch(ctx, o, id.n*chunkSize+off, int64(len(buf)), to)
		}
		if err != nil {
			return err
		}
	}
}

// fill is a Writer into a slice.
type fill struct{ buf []byte }

// Write implements io.Writer.
func (f *fill) Write(b []byte) (int, error) {
	n := copy(f.buf, b)
	f.buf = f.buf[n:]
	if n < len(b) {
		return n, io.ErrShortBuffer
	}
	return n, nil
}

// length is how many bytes a chunk has.
func length(o bucket.Object, n int64) int64 { return min(chunkSize, o.Size-n*chunkSize) }

// have reads from disk; false: it is not there.
func (c *cache) have(id chunkID, o bucket.Object, off int64, buf []byte) bool {
	c.mu.Lock()
	at, ok := c.known[id]
	sound := false
	if ok {
		c.order.MoveToFront(at)
		sound = at.Value.(*cached).sound
	}
	c.mu.Unlock()
	if !ok {
		return false
	}
	f, err := os.Open(c.path(id))
	if err == nil {
		if !sound {
			err = check(f, length(o, id.n))
		}
		if err == nil {
			_, err = f.ReadAt(buf, off)
		}
		err = errors.Join(err, f.Close())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if at, ok = c.known[id]; ok && err == nil {
		at.Value.(*cached).sound = true
	} else if ok {
		c.dropLocked(at) // damaged, or removed behind our back: it is fetched again
	}
	return err == nil
}

var errDamaged = errors.New("a damaged chunk")

func check(f *os.File, n int64) error {
	hash := sha256.New()
	if _, err := io.Copy(hash, io.NewSectionReader(f, 0, n)); err != nil {
		return err
	}
	sum := make([]byte, sha256.Size+1)
	if got, err := f.ReadAt(sum, n); got != sha256.Size || !errors.Is(err, io.EOF) || !bytes.Equal(hash.Sum(nil), sum[:sha256.Size]) {
		return errDamaged
	}
	return nil
}

// get fetches a chunk, or waits for whoever does.
func (c *cache) get(ctx context.Context, o bucket.Object, id chunkID) error {
	c.mu.Lock()
	f, ok := c.under[id]
	if !ok {
		f = &flight{done: make(chan struct{})}
		c.under[id] = f
		c.wg.Go(func() { c.bring(o, id, f) })
	}
	c.mu.Unlock()
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// bring fetches a chunk to disk. It belongs to nobody's request: others may wait for it.
func (c *cache) bring(o bucket.Object, id chunkID, f *flight) {
	ctx, cancel := context.WithTimeout(c.ctx, defaultDeadline)
	defer cancel()
	f.err = c.write(ctx, o, id)
	c.mu.Lock()
	delete(c.under, id)
	c.mu.Unlock()
	close(f.done)
}

func (c *cache) write(ctx context.Context, o bucket.Object, id chunkID) error {
	path := c.path(id)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "new*")
	if err != nil {
		return err
	}
	n := length(o, id.n)
	hash := sha256.New()
	err = c.fetch(ctx, o, id.n*chunkSize, n, io.MultiWriter(f, hash))
	if err == nil {
		_, err = f.Write(hash.Sum(nil))
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	c.mu.Lock()
	if at, ok := c.known[id]; ok {
		c.dropLocked(at)
	}
	c.addLocked(&cached{id: id, bytes: max(n+sha256.Size, overhead), sound: true})
	remove := c.shrinkLocked()
	c.mu.Unlock()
	for _, old := range remove {
		os.Remove(old) //nolint:errcheck // the next process finds it
	}
	return nil
}

// ahead fetches chunks that a reader will want, as far as there is room.
func (c *cache) ahead(o bucket.Object, from, to int64) {
	version := versionOf(o)
	for n := from; n < to && n*chunkSize < o.Size; n++ {
		id := chunkID{version, n}
		c.mu.Lock()
		_, known := c.known[id]
		_, under := c.under[id]
		if known || under {
			c.mu.Unlock()
			continue
		}
		select {
		case c.room <- struct{}{}:
		default:
			c.mu.Unlock()
			return
		}
		f := &flight{done: make(chan struct{})}
		c.under[id] = f
		c.wg.Go(func() {
			defer func() { <-c.room }()
			c.bring(o, id, f)
		})
		c.mu.Unlock()
	}
}

// pace is how a handle is read: the window doubles while reads follow each other.
type pace struct {
	mu     sync.Mutex
	next   int64 // where a sequential read would go on
	window int64 // chunks
}

// after notes a read and says which chunks to fetch ahead.
func (p *pace) after(off, n int64) (from, to int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	// The kernel reads ahead by itself, so reads may overtake each other a little.
	if near := off - p.next; near > -chunkSize && near < chunkSize {
		if (off+n)/chunkSize != off/chunkSize || p.window == 0 {
			p.window = min(max(2*p.window, 1), maxAhead)
		}
	} else {
		p.window = 0
	}
	p.next = off + n
	from = (off + n + chunkSize - 1) / chunkSize
	return from, from + p.window
}

// fetch is how the cache gets bytes.
func (b *Bucket) fetch(ctx context.Context, o bucket.Object, off, n int64, w io.Writer) error {
	err := b.cfg.Remote.Read(ctx, o.Key, o.ETag, off, n, w)
	b.heard(err)
	return err
}
