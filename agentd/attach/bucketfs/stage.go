package bucketfs

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/postern-dev/postern/agentd/attach/bucket"
	"github.com/postern-dev/postern/proto"
)

const stagedDir = "staged"

// record is what is on disk of a stage.
type record struct {
	Key string `json:"key"`
	// Boot is the life of the host that it was made in: after another one its content may be
	// torn, if it was not synced.
	Boot string `json:"boot"`
	// Dirty: the bucket does not have it. Closed: its writers were done when they closed it.
	Dirty  bool `json:"dirty"`
	Closed bool `json:"closed"`
	// Gone: the file was removed; its content is for those who have it open.
	Gone bool   `json:"gone,omitempty"`
	Slot uint8  `json:"slot,omitempty"` // of the file system whose node has it, if it is gone
	Node uint64 `json:"node,omitempty"`
	// Uploaded: the bucket has an object of this key, of this content or another.
	Uploaded bool      `json:"uploaded,omitempty"`
	Since    time.Time `json:"since"`
}

// stage is the local copy of a file that is written to.
type stage struct {
	b  *Bucket
	id string
	f  *os.File

	// uploading is held during an upload, and while the key changes.
	uploading sync.Mutex

	// The rest is guarded by Bucket.mu.
	rec      record
	size     int64 // of the content, in bytes
	gen      uint64
	users    int  // handles
	finished bool // it is no more; object is what became of it
	object   bucket.Object
	failure  string
	tried    time.Time
	pause    time.Duration
	stop     context.CancelFunc // ends the upload under way; nil if none is
}

func (b *Bucket) stagePath(id string) string { return filepath.Join(b.cfg.Dir, stagedDir, id) }

// save writes what is known of a stage.
func (b *Bucket) save(id string, rec record) error {
	text, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	path := b.stagePath(id) + ".json"
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// loadStages finds what lives before have left.
func (b *Bucket) loadStages() error {
	entries, err := os.ReadDir(filepath.Join(b.cfg.Dir, stagedDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		id, isRecord := strings.CutSuffix(e.Name(), ".json")
		if !isRecord {
			if _, err := os.Stat(b.stagePath(e.Name()) + ".json"); errors.Is(err, os.ErrNotExist) {
				os.Remove(b.stagePath(e.Name())) //nolint:errcheck // the next start tries again
			}
			continue
		}
		var rec record
		text, err := os.ReadFile(b.stagePath(e.Name()))
		if err == nil {
			err = json.Unmarshal(text, &rec)
		}
		var f *os.File
		if err == nil {
			f, err = os.OpenFile(b.stagePath(id), os.O_RDWR, 0)
		}
		if err != nil {
			b.cfg.Log.Error("staged file not readable: it is thrown away", "bucket", b.cfg.Name, "err", err)
			b.remove(id)
			continue
		}
		info, err := f.Stat()
		if err != nil {
			return errors.Join(err, f.Close())
		}
		st := &stage{b: b, id: id, f: f, rec: rec, size: info.Size()}
		b.stages[id], b.left[id] = st, st
		b.staged += st.size
		if !rec.Gone {
			b.byKey[rec.Key] = st
		}
	}
	return nil
}

// settle decides about stages that were left and have no handles: they are uploaded, if
// they were closed in this life of the host, or thrown away.
func (b *Bucket) settle(which func(*stage) bool) {
	b.mu.Lock()
	var lost []string
	for id, st := range b.left {
		if st.users > 0 {
			delete(b.left, id)
			continue
		}
		if !which(st) {
			continue
		}
		delete(b.left, id)
		keep := st.rec.Dirty && st.rec.Closed && !st.rec.Gone && st.rec.Boot == b.cfg.Boot && !b.cfg.ReadOnly
		if keep {
			continue
		}
		if st.rec.Dirty && !st.rec.Gone {
			lost = append(lost, st.rec.Key)
		}
		b.endLocked(st, bucket.Object{})
	}
	b.mu.Unlock()
	for _, key := range lost {
		b.cfg.Log.Warn("file thrown away: it was never closed, or the host has started anew since", "bucket", b.cfg.Name, "key", key)
	}
	b.wake()
}

// newStage makes an empty one for a key. Its user is counted.
func (b *Bucket) newStage(key string, uploaded, dirty bool) (*stage, error) {
	var raw [12]byte
	rand.Read(raw[:]) //nolint:errcheck // it never fails
	id := hex.EncodeToString(raw[:])
	f, err := os.OpenFile(b.stagePath(id), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	now := time.Now().UTC()
	st := &stage{b: b, id: id, f: f, rec: record{Key: key, Boot: b.cfg.Boot, Uploaded: uploaded, Dirty: dirty, Since: now}, users: 1}
	if err := b.save(id, st.rec); err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(b.stagePath(id)))
	}
	return st, nil
}

// remove takes a stage's files off the disk: first what says that it exists.
func (b *Bucket) remove(id string) {
	os.Remove(b.stagePath(id) + ".json") //nolint:errcheck // the next start finds it
	os.Remove(b.stagePath(id))           //nolint:errcheck // the same
}

// endLocked ends a stage; object is what the file is from now on.
func (b *Bucket) endLocked(st *stage, object bucket.Object) {
	if st.finished {
		return
	}
	st.finished, st.object = true, object
	if b.byKey[st.rec.Key] == st {
		delete(b.byKey, st.rec.Key)
	}
	delete(b.stages, st.id)
	delete(b.left, st.id)
	b.staged -= st.size
	b.remove(st.id)
	st.f.Close() //nolint:errcheck // its content is not needed any more
}

// growLocked counts a stage that gets larger, or refuses it.
func (b *Bucket) growLocked(st *stage, size int64) error {
	switch {
	case size > bucket.MaxObject:
		return syscall.EFBIG
	case size > st.size && b.staged+size-st.size > b.cfg.MaxStaged:
		return syscall.ENOSPC
	}
	b.staged += size - st.size
	st.size = size
	return nil
}

// touchLocked notes that the content is about to change, or has changed.
func (b *Bucket) touchLocked(st *stage) error {
	st.gen++
	if st.rec.Dirty && !st.rec.Closed {
		return nil
	}
	rec := st.rec
	if !rec.Dirty {
		rec.Since = time.Now().UTC()
	}
	rec.Dirty, rec.Closed = true, false
	if err := b.save(st.id, rec); err != nil {
		return err
	}
	st.rec = rec
	return nil
}

// write changes the content. The second count is for an upload that has begun meanwhile.
func (b *Bucket) write(st *stage, off int64, data []byte) (int, error) {
	b.mu.Lock()
	err := b.growLocked(st, max(st.size, off+int64(len(data))))
	if err == nil {
		err = b.touchLocked(st)
	}
	b.mu.Unlock()
	if err != nil {
		return 0, err
	}
	n, err := st.f.WriteAt(data, off)
	b.mu.Lock()
	defer b.mu.Unlock()
	return n, errors.Join(err, b.touchLocked(st))
}

func (b *Bucket) truncate(st *stage, size int64) error {
	b.mu.Lock()
	err := b.growLocked(st, size)
	if err == nil {
		err = b.touchLocked(st)
	}
	b.mu.Unlock()
	if err != nil {
		return err
	}
	err = st.f.Truncate(size)
	b.mu.Lock()
	defer b.mu.Unlock()
	return errors.Join(err, b.touchLocked(st))
}

// fillStage copies an object into a stage, up to size bytes.
func (b *Bucket) fillStage(ctx context.Context, st *stage, o bucket.Object) error {
	b.mu.Lock()
	err := b.growLocked(st, o.Size)
	b.mu.Unlock()
	if err != nil {
		return err
	}
	buf := make([]byte, chunkSize)
	for off := int64(0); off < o.Size; off += chunkSize {
		b.cache.ahead(o, off/chunkSize, off/chunkSize+4)
		n, err := b.cache.read(ctx, o, off, buf)
		if err != nil {
			return err
		}
		if _, err := st.f.WriteAt(buf[:n], off); err != nil {
			return err
		}
	}
	return nil
}

// uploadTries is how often a content is uploaded that changes meanwhile.
const uploadTries = 3

// upload makes an object of a stage, if it is not one yet. With closed its writers are done.
func (b *Bucket) upload(ctx context.Context, st *stage, closed bool) error {
	st.uploading.Lock()
	defer st.uploading.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for range uploadTries {
		b.mu.Lock()
		if st.finished || !st.rec.Dirty || st.rec.Gone {
			b.mu.Unlock()
			return nil
		}
		if closed && !st.rec.Closed {
			rec := st.rec
			rec.Closed = true
			if err := b.save(st.id, rec); err != nil {
				b.mu.Unlock()
				return err
			}
			st.rec = rec
		}
		gen, size, key := st.gen, st.size, st.rec.Key
		st.stop, st.tried = cancel, time.Now()
		b.mu.Unlock()
		o, err := b.cfg.Remote.Write(ctx, key, st.f, size)
		for try := 1; proto.CodeOf(err) == proto.CodeUnavailable && try < uploadTries && ctx.Err() == nil; try++ {
			o, err = b.cfg.Remote.Write(ctx, key, st.f, size)
		}
		b.heard(err)
		b.mu.Lock()
		st.stop = nil
		done := false
		if err == nil {
			st.failure, st.pause = "", 0
			st.object = o
			st.rec.Uploaded = true
			if done = st.gen == gen; done {
				st.rec.Dirty = false
			}
			err = b.save(st.id, st.rec)
		} else {
			st.failure = strings.Join(strings.Fields(err.Error()), " ")
		}
		b.mu.Unlock()
		if err != nil || done {
			return err
		}
	}
	return nil
}

// work uploads what was left, or could not be uploaded when it was closed.
func (b *Bucket) work() {
	orphans := time.NewTimer(orphanTime)
	defer orphans.Stop()
	ticker := time.NewTicker(b.cfg.RetryForTest)
	defer ticker.Stop()
	for {
		select {
		case <-b.ctx.Done():
			return
		case <-orphans.C:
			b.settle(func(*stage) bool { return true })
		case <-b.kick:
		case <-ticker.C:
		}
		b.mu.Lock()
		var due []*stage
		for id, st := range b.stages {
			_, left := b.left[id]
			if left || st.users > 0 || st.stop != nil || time.Since(st.tried) < st.pause {
				continue
			}
			due = append(due, st)
		}
		b.mu.Unlock()
		for _, st := range due {
			b.finish(st)
		}
	}
}

// finish uploads a stage that nobody has open, and ends it.
func (b *Bucket) finish(st *stage) {
	ctx, cancel := context.WithTimeout(b.ctx, UploadDeadline)
	defer cancel()
	err := b.upload(ctx, st, true)
	if err != nil && b.ctx.Err() == nil {
		b.cfg.Log.Warn("file not uploaded: it is tried again", "bucket", b.cfg.Name, "key", st.rec.Key, "err", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case err != nil:
		st.pause = min(max(2*st.pause, b.cfg.RetryForTest), retryLast)
	case st.users == 0 && (!st.rec.Dirty || st.rec.Gone):
		b.endLocked(st, st.object)
	}
}

// read reads the content.
func (st *stage) read(off int64, buf []byte) (int, error) {
	n, err := st.f.ReadAt(buf, off)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}
