package fusefs

import (
	"bytes"
	"fmt"
	"io/fs"
	"math/rand"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// shadow keeps in dir what a loss of power would leave: the synced length of journals and
// copies of synced contents.
func shadow(dir string) func(path string, length int64) {
	var mu sync.Mutex
	return func(path string, length int64) {
		mu.Lock()
		defer mu.Unlock()
		data := []byte(strconv.FormatInt(length, 10))
		name := filepath.Join(dir, filepath.Base(path)+".length")
		if length < 0 {
			name = filepath.Join(dir, filepath.Base(path)+".copy")
			var err error
			if data, err = os.ReadFile(path); err != nil {
				return
			}
		}
		if err := os.WriteFile(name+".new", data, 0o600); err != nil {
			panic(err)
		}
		if err := os.Rename(name+".new", name); err != nil {
			panic(err)
		}
	}
}

// losePower makes the replica in dir what a disk has after a loss of power: of what was
// not synced, some is there, some is zeros, some is garbage and some is gone.
func losePower(t *testing.T, r *rand.Rand, dir, shadow string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		base := filepath.Base(p)
		if strings.HasPrefix(base, "journal-") {
			synced := 0
			if b, err := os.ReadFile(filepath.Join(shadow, base+".length")); err == nil {
				synced, _ = strconv.Atoi(string(b))
			}
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			return os.WriteFile(p, spoil(r, data, synced), 0o600)
		}
		data, err := os.ReadFile(filepath.Join(shadow, base+".copy"))
		if err == nil {
			return os.WriteFile(p, data, 0o600)
		}
		if r.Intn(2) == 0 {
			return os.Remove(p)
		}
		if data, err = os.ReadFile(p); err != nil {
			return err
		}
		return os.WriteFile(p, spoil(r, data, 0), 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func spoil(r *rand.Rand, data []byte, synced int) []byte {
	tail := data[synced:]
	switch r.Intn(4) {
	case 0:
		tail = nil
	case 1:
		tail = tail[:r.Intn(len(tail)+1)]
	case 2:
		clear(tail[r.Intn(len(tail)+1):])
	case 3:
		r.Read(tail[r.Intn(len(tail)+1):])
	}
	return append(data[:synced:synced], tail...)
}

// writer makes files, closed and synced ones, until its file system breaks, and remembers
// what it was promised.
type writer struct {
	root string
	rand *rand.Rand
	// closed has the content of files that were closed; removed those that were removed and
	// whose removal was synced. Names of both are used once.
	closed  map[string][]byte
	maybe   map[string][][]byte // files that were being replaced: any of these
	removed map[string]bool
	visible map[string][]byte // what any system call wrote, synced or not
}

func newWriter(root string, seed int64) *writer {
	return &writer{root: root, rand: rand.New(rand.NewSource(seed)), closed: map[string][]byte{}, maybe: map[string][][]byte{}, removed: map[string]bool{}, visible: map[string][]byte{}}
}

func (w *writer) content() []byte {
	n := []int{0, 10, 1000, 4096, 30_000, 40_000, 300_000, 1_500_000}[w.rand.Intn(8)]
	b := make([]byte, n)
	w.rand.Read(b)
	return b
}

// run returns when something fails.
func (w *writer) run(name string) {
	for i := 0; ; i++ {
		if !w.one(fmt.Sprintf("%s-%d", name, i)) {
			return
		}
	}
}

func (w *writer) one(name string) bool {
	data := w.content()
	path := filepath.Join(w.root, name)
	switch w.rand.Intn(5) {
	case 0, 1: // made and closed
		if !w.write(path, data, false) {
			return false
		}
		w.closed[name] = data
	case 2: // replaced by rename, as editors do
		if !w.write(path, data, false) {
			return false
		}
		w.closed[name] = data
		next := w.content()
		if !w.write(path+".tmp", next, true) {
			return false
		}
		delete(w.closed, name)
		w.maybe[name] = [][]byte{data, next}
		if os.Rename(path+".tmp", path) != nil {
			return false
		}
		if w.syncDir() {
			delete(w.maybe, name)
			w.closed[name] = next
		}
	case 3: // appended to and synced, and appended to without
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			return false
		}
		defer f.Close()
		if _, err := f.Write(data); err != nil || f.Sync() != nil {
			return false
		}
		w.closed[name+"\x00prefix"] = data
		if _, err := f.Write(data); err != nil {
			return false
		}
		w.visible[name] = append(bytes.Clone(data), data...)
		if f.Close() != nil {
			return false
		}
		w.closed[name] = w.visible[name]
	case 4: // removed for good
		if !w.write(path, data, false) || os.Remove(path) != nil {
			return false
		}
		if w.syncDir() {
			w.removed[name] = true
		}
	}
	return true
}

func (w *writer) write(path string, data []byte, sync bool) bool {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return false
	}
	for off := 0; off < len(data); off += 70_000 {
		if _, err := f.Write(data[off:min(len(data), off+70_000)]); err != nil {
			f.Close()
			return false
		}
	}
	// Closing a file makes durable what was written to it; that there is an empty one is only
	// durable with a sync.
	if (sync || len(data) == 0) && f.Sync() != nil {
		f.Close()
		return false
	}
	return f.Close() == nil
}

func (w *writer) syncDir() bool {
	d, err := os.Open(w.root)
	if err != nil {
		return false
	}
	defer d.Close()
	return d.Sync() == nil
}

func (w *writer) check(t *testing.T, root string) {
	t.Helper()
	for name, want := range w.closed {
		name, prefix := strings.CutSuffix(name, "\x00prefix")
		got, err := os.ReadFile(filepath.Join(root, name))
		switch {
		case err != nil:
			t.Errorf("%s was promised: %v", name, err)
		case prefix && !bytes.HasPrefix(got, want), !prefix && !bytes.Equal(got, want):
			t.Errorf("%s has %d bytes, promised were %d; they differ at %d (prefix: %v)", name, len(got), len(want), differ(got, want), prefix)
		}
	}
	for name, either := range w.maybe {
		got, err := os.ReadFile(filepath.Join(root, name))
		if err != nil || !bytes.Equal(got, either[0]) && !bytes.Equal(got, either[1]) {
			t.Errorf("%s is torn: %d bytes, %v; it was %d and then %d", name, len(got), err, len(either[0]), len(either[1]))
		}
	}
	for name := range w.removed {
		if _, err := os.Lstat(filepath.Join(root, name)); err == nil {
			t.Errorf("%s was removed, and is there", name)
		}
	}
}

func differ(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// TestCrash kills the serving process at random moments under writers, half of the time
// with a loss of what was not synced, and wants everything that was promised; on another host,
// too.
func TestCrash(t *testing.T) {
	rounds := amount(6, 100)
	if s := os.Getenv("POSTERN_CRASH_ROUNDS"); s != "" {
		rounds, _ = strconv.Atoi(s)
	}
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewSource(seed))
	w := newWorld(t)
	s := serving{Dir: filepath.Join(t.TempDir(), "replica"), Target: filepath.Join(t.TempDir(), "mnt"), Shadow: t.TempDir()}
	if err := os.Mkdir(s.Target, 0o755); err != nil {
		t.Fatal(err)
	}
	var writers []*writer
	boot := 0
	for round := range rounds {
		s.Config.Boot = fmt.Sprint("boot ", boot)
		s.NoPassthrough = r.Intn(2) == 0
		m := w.mount(s)
		m.watchdog()
		for _, x := range writers {
			x.check(t, m.path)
		}
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
		var wg sync.WaitGroup
		for i := range 3 {
			x := newWriter(m.path, r.Int63())
			writers = append(writers, x)
			wg.Go(func() { x.run(fmt.Sprintf("r%d-w%d", round, i)) })
		}
		time.Sleep(time.Duration(r.Intn(500)) * time.Millisecond)
		m.kill()
		wg.Wait()
		m.detach()
		if r.Intn(2) == 0 {
			losePower(t, r, s.Dir, s.Shadow)
			boot++
		} // else the page cache is still there
	}
	s.Config.Boot = fmt.Sprint("boot ", boot)
	m := w.mount(s)
	for _, x := range writers {
		x.check(t, m.path)
	}
	drained(t, m)
	other := w.mount(serving{})
	for _, x := range writers {
		x.check(t, other.path)
	}
	files := 0
	for _, x := range writers {
		files += len(x.closed)
	}
	t.Logf("%d promises were kept", files)
	if files == 0 {
		t.Error("nothing was promised, so nothing was tested")
	}
}
