package fusefs

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
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

// power is the disk of a host that loses its power from time to time: dir is its replica, shadow what function
// shadow keeps.
type power struct {
	dir, shadow string
	// kept are the files that are what was synced of them, and that, as they were then.
	kept map[string][2]stamped
}

// stamped is a state of a file: whoever changes it changes this.
type stamped struct {
	inode uint64
	ctime syscall.Timespec
}

func stampOf(path string) (s stamped, err error) {
	var st syscall.Stat_t
	err = syscall.Stat(path, &st)
	return stamped{st.Ino, st.Ctim}, err
}

// lose makes the replica what a disk has after a loss of power: of what was
// not synced, some is there, some is zeros, some is garbage and some is gone.
func (w *power) lose(t *testing.T, r *rand.Rand) {
	t.Helper()
	err := filepath.WalkDir(w.dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		base := filepath.Base(p)
		if strings.HasPrefix(base, "journal-") {
			synced := 0
			if b, err := os.ReadFile(filepath.Join(w.shadow, base+".length")); err == nil {
				synced, _ = strconv.Atoi(string(b))
			}
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			return os.WriteFile(p, spoil(r, data, synced), 0o600)
		}
		name := filepath.Join(w.shadow, base+".copy")
		if kept, err := stampOf(name); err == nil {
			now, err := stampOf(p)
			if err != nil || w.kept[p] == [2]stamped{now, kept} {
				return err
			}
			data, err := os.ReadFile(name)
			if err == nil {
				err = os.WriteFile(p, data, 0o600)
			}
			if err == nil {
				now, err = stampOf(p)
				w.kept[p] = [2]stamped{now, kept}
			}
			return err
		}
		if r.Intn(2) == 0 {
			return os.Remove(p)
		}
		data, err := os.ReadFile(p)
		if err != nil {
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
	closed  map[string]promise
	maybe   map[string][]promise // files that were being replaced: any of these
	removed map[string]bool
}

func newWriter(root string, seed int64) *writer {
	return &writer{root: root, rand: rand.New(rand.NewSource(seed)), closed: map[string]promise{}, maybe: map[string][]promise{}, removed: map[string]bool{}}
}

// promise is a content: its bytes, or only their number and hash.
type promise struct {
	bytes []byte
	size  int
	sum   [sha256.Size]byte
}

func promised(b []byte) promise { return promise{bytes: b, size: len(b), sum: sha256.Sum256(b)} }

func (p promise) is(b []byte) bool { return len(b) == p.size && sha256.Sum256(b) == p.sum }

// differs is where b differs first; -1 if the bytes were let go.
func (p promise) differs(b []byte) int {
	if p.bytes == nil {
		return -1
	}
	return differ(b, p.bytes)
}

// letGo lets the bytes go: rounds by the hundred do not fit into memory.
func (w *writer) letGo() {
	for name, p := range w.closed {
		p.bytes = nil
		w.closed[name] = p
	}
	for _, either := range w.maybe {
		for i := range either {
			either[i].bytes = nil
		}
	}
}

func (w *writer) content() []byte {
	sizes := []int{0, 10, 1000, 4096, 30_000, 40_000}
	if w.rand.Intn(4) == 0 {
		sizes = []int{300_000, 300_000, 1_500_000}
	}
	n := sizes[w.rand.Intn(len(sizes))]
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
		w.closed[name] = promised(data)
	case 2: // replaced by rename, as editors do
		if !w.write(path, data, false) {
			return false
		}
		w.closed[name] = promised(data)
		next := w.content()
		if !w.write(path+".tmp", next, true) {
			return false
		}
		delete(w.closed, name)
		w.maybe[name] = []promise{promised(data), promised(next)}
		if os.Rename(path+".tmp", path) != nil {
			return false
		}
		if w.syncDir() {
			delete(w.maybe, name)
			w.closed[name] = promised(next)
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
		w.closed[name+"\x00prefix"] = promised(data)
		if _, err := f.Write(data); err != nil {
			return false
		}
		if f.Close() != nil {
			return false
		}
		w.closed[name] = promised(slices.Concat(data, data))
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

// check looks at one in every of what was promised, and returns at how many.
func (w *writer) check(t *testing.T, root string, r *rand.Rand, every int) (looked int) {
	t.Helper()
	chosen := func() bool {
		if every > 1 && r.Intn(every) != 0 {
			return false
		}
		looked++
		return true
	}
	for name, want := range w.closed {
		if !chosen() {
			continue
		}
		name, prefix := strings.CutSuffix(name, "\x00prefix")
		got, err := os.ReadFile(filepath.Join(root, name))
		switch {
		case err != nil:
			t.Errorf("%s was promised: %v", name, err)
		case prefix && (len(got) < want.size || !want.is(got[:want.size])), !prefix && !want.is(got):
			t.Errorf("%s has %d bytes, promised were %d; they differ at %d (prefix: %v)", name, len(got), want.size, want.differs(got), prefix)
		}
	}
	for name, either := range w.maybe {
		if !chosen() {
			continue
		}
		got, err := os.ReadFile(filepath.Join(root, name))
		if err != nil || !either[0].is(got) && !either[1].is(got) {
			t.Errorf("%s is torn: %d bytes, %v; it was %d and then %d", name, len(got), err, either[0].size, either[1].size)
		}
	}
	for name := range w.removed {
		if !chosen() {
			continue
		}
		if _, err := os.Lstat(filepath.Join(root, name)); err == nil {
			t.Errorf("%s was removed, and is there", name)
		}
	}
	return looked
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
// too. After each kill it looks at what the last three rounds were promised and at some of what those
// before were, or one with 200 would take hours; every twentieth time, and at the end, at everything.
func TestCrash(t *testing.T) {
	rounds := amount(6, 100)
	if s := os.Getenv("POSTERN_CRASH_ROUNDS"); s != "" {
		var err error
		if rounds, err = strconv.Atoi(s); err != nil || rounds < 1 {
			t.Fatalf("POSTERN_CRASH_ROUNDS=%q is no number of rounds", s)
		}
	}
	const recent, full, some = 3, 20, 300
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewSource(seed))
	w := newWorld(t)
	s := serving{Dir: filepath.Join(t.TempDir(), "replica"), Target: filepath.Join(t.TempDir(), "mnt"), Shadow: t.TempDir()}
	if err := os.Mkdir(s.Target, 0o755); err != nil {
		t.Fatal(err)
	}
	disk := power{dir: s.Dir, shadow: s.Shadow, kept: map[string][2]stamped{}}
	var writers []*writer // three of each round
	promises := func(of []*writer) (n int) {
		for _, x := range of {
			n += len(x.closed) + len(x.maybe) + len(x.removed)
		}
		return n
	}
	looked, lost, boot, begun := 0, 0, 0, time.Now()
	for round := range rounds {
		s.Config.Boot = fmt.Sprint("boot ", boot)
		s.NoPassthrough = r.Intn(2) == 0
		m := w.mount(s)
		m.watchdog()
		old := max(0, len(writers)-3*recent)
		every := max(1, promises(writers[:old])/some)
		if round%full == 0 {
			every = 1
			t.Logf("round %d after %s: %d promises so far", round, time.Since(begun).Round(time.Second), promises(writers))
		}
		for i, x := range writers {
			if i < old {
				x.letGo()
				looked += x.check(t, m.path, r, every)
			} else {
				looked += x.check(t, m.path, r, 1)
			}
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
			disk.lose(t, r)
			boot++
			lost++
		} // else the page cache is still there
	}
	s.Config.Boot = fmt.Sprint("boot ", boot)
	m := w.mount(s)
	for _, x := range writers {
		looked += x.check(t, m.path, r, 1)
	}
	drained(t, m)
	other := w.mount(serving{})
	for _, x := range writers {
		looked += x.check(t, other.path, r, 1)
	}
	n := promises(writers)
	t.Logf("%d kills, %d of them with a loss of power: %d promises were kept, looked at %d times, in %s", rounds, lost, n, looked, time.Since(begun).Round(time.Second))
	if n == 0 {
		t.Error("nothing was promised, so nothing was tested")
	}
}
