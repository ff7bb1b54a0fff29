package pagestore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// kept is a file of keys in memory.
type kept struct {
	mu   sync.Mutex
	file []byte
	err  error // of the next save
}

func newKept(t testing.TB) *kept {
	t.Helper()
	return &kept{file: bytes.Clone(testKey[:])}
}

func (k *kept) ring(t testing.TB) *Ring {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	r, err := ParseRing(k.file, time.Unix(1_700_000_000, 0))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (k *kept) save(r *Ring) error {
	b, err := r.Encode()
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.err != nil {
		return k.err
	}
	k.file = b
	return nil
}

func (k *kept) use(t testing.TB) func(*Options) {
	return func(o *Options) { o.LoadRing, o.SaveRing = func() (*Ring, error) { return k.ring(t), nil }, k.save }
}

func resealAll(t testing.TB, s *Store, budget int64) (total ResealStats) {
	t.Helper()
	for range 10000 {
		st, err := s.Reseal(context.Background(), budget)
		if err != nil {
			t.Fatal(err)
		}
		total.Packs += st.Packs
		total.Checkpoints += st.Checkpoints
		total.Dropped = append(total.Dropped, st.Dropped...)
		total.Stuck, total.Why = st.Stuck, st.Why
		if st.Done {
			return total
		}
	}
	t.Fatal("Reseal is never done")
	return total
}

func mustRotate(t testing.TB, s *Store) KeyInfo {
	t.Helper()
	k, err := s.RotateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func mustKeys(t testing.TB, s *Store) []KeyInfo {
	t.Helper()
	list, err := s.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// filesOf are all files of a store, by path.
func filesOf(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	if err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() == "lock" {
			return err
		}
		out[path], err = os.ReadFile(path)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestRotateKey(t *testing.T) {
	contents, dir, keys := crashContents(t), t.TempDir(), newKept(t)
	// A store of before, with one key and no ids.
	old := openStore(t, dir)
	a, first := mustPut(t, old, meta("k1"), contents[0])
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, dir, keys.use(t))
	mustRestore(t, s, a.ID, contents[0])
	before := mustKeys(t, s)
	if len(before) != 1 || !before[0].Newest || before[0].Packs != 1 || before[0].Chunks != 300 || before[0].Checkpoints != 1 || before[0].Bytes == 0 {
		t.Fatalf("keys before: %+v", before)
	}
	fresh := mustRotate(t, s)

	// What was stored is known, whatever sealed it.
	b, second := mustPut(t, s, meta("k1"), contents[1])
	if second.New != 0 || first.New == 0 {
		t.Errorf("%d bytes were stored again after the rotation", second.New)
	}
	c, _ := mustPut(t, s, meta("k2"), contents[2])
	// An organization that came after the rotation.
	d, _ := mustPut(t, s, Meta{Organization: "org_b", Kernel: "k"}, contents[3])
	all := map[ID]string{a.ID: contents[0], b.ID: contents[1], c.ID: contents[2], d.ID: contents[3]}
	list := mustKeys(t, s)
	if len(list) != 2 || list[0].ID != before[0].ID || list[0].Newest || list[1].ID != fresh.ID || !list[1].Newest {
		t.Fatalf("keys after a rotation: %+v", list)
	}
	if list[0].Packs != 1 || list[0].Chunks != 300 || list[0].Checkpoints != 1 || list[1].Packs != 2 || list[1].Chunks != 100+20 || list[1].Checkpoints != 3 {
		t.Errorf("keys after a rotation: %+v", list)
	}

	// The same after a restart in the midst of it.
	reopen := func() {
		t.Helper()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = openStore(t, dir, keys.use(t))
		for id, want := range all {
			mustRestore(t, s, id, want)
		}
	}
	reopen()
	if got := mustKeys(t, s); !slices.Equal(got, list) {
		t.Errorf("keys after a restart: %+v, want %+v", got, list)
	}
	if _, again := mustPut(t, s, meta("k1"), contents[0]); again.New != 0 {
		t.Errorf("%d bytes were stored again after a restart", again.New)
	}

	was := filesOf(t, dir)
	st := resealAll(t, s, 1)
	if st.Packs != 1 || st.Checkpoints != 1 || !slices.Equal(st.Dropped, []string{before[0].ID}) || st.Stuck != 0 {
		t.Errorf("Reseal: %+v", st)
	}
	list = mustKeys(t, s)
	if len(list) != 1 || list[0].ID != fresh.ID || list[0].Packs != 3 || list[0].Chunks != 420 || list[0].Checkpoints != 5 {
		t.Errorf("keys afterwards: %+v", list)
	}
	used := s.Used()
	reopen()
	if got := s.Used(); got != used {
		t.Errorf("Used was %d, %d after a restart", used, got)
	}
	if p, err := s.Verify(t.Context()); err != nil || len(p) > 0 {
		t.Errorf("Verify: %v %v", p, err)
	}
	if _, again := mustPut(t, s, meta("k1"), contents[2]); again.New != 0 {
		t.Errorf("%d bytes were stored again after all", again.New)
	}

	// The canary: nothing of what the old key sealed is left, and the old key opens nothing.
	if bytes.Contains(keys.file, []byte(before[0].ID)) {
		t.Error("the old key is still in the file of keys")
	}
	for path, now := range filesOf(t, dir) {
		if prev, there := was[path]; there && strings.Contains(path, "org_a") && bytes.Equal(prev, now) && !bytes.HasPrefix(prev, []byte("PSTPACK2")) && prev[7] != '2' {
			t.Errorf("%s was not sealed anew", path)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	thief := openStore(t, dir)
	if list, damagedIDs := thief.List("org_a", ""); len(list) != 0 || len(damagedIDs) == 0 {
		t.Errorf("the old key opens %v", list)
	}
	if _, err := thief.Get(a.ID); !errors.Is(err, errNoKey) || !strings.Contains(err.Error(), "put the right file back") {
		t.Errorf("with the old key: %v", err)
	}
}

// TestRotateWhileItWorks rotates and seals anew while checkpoints are stored, restored,
// deleted and collected.
func TestRotateWhileItWorks(t *testing.T) {
	contents, keys := crashContents(t), newKept(t)
	s := openStore(t, t.TempDir(), keys.use(t))
	stay, _ := mustPut(t, s, meta("stays"), contents[0])
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for n := range 2 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				m := meta(fmt.Sprintf("k%d", n))
				m.ID = NewID()
				want := contents[(i+n)%len(contents)]
				if _, _, err := s.Put(context.Background(), m, []Tree{{"images", want}}); err != nil {
					t.Error(err)
					return
				}
				for _, id := range []ID{m.ID, stay.ID} {
					to, err := os.MkdirTemp(t.TempDir(), "")
					if err == nil {
						_, err = s.Restore(context.Background(), id, map[string]string{"images": to})
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
				if err := errors.Join(s.Protect(m.ID, true), s.Delete(m.ID)); err != nil {
					t.Error(err)
					return
				}
				if _, err := s.Collect(context.Background(), 1<<20); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 8 {
		mustRotate(t, s)
		for dropped := false; !dropped; {
			st, err := s.Reseal(t.Context(), 64<<10)
			if err != nil || st.Stuck > 0 {
				t.Fatal(st, err)
			}
			dropped = len(st.Dropped) > 0
		}
		if list := mustKeys(t, s); len(list) != 1 {
			t.Errorf("keys: %+v", list)
		}
	}
	close(stop)
	wg.Wait()
	mustRestore(t, s, stay.ID, contents[0])
	if p, err := s.Verify(t.Context()); err != nil || len(p) > 0 {
		t.Errorf("Verify: %v %v", p, err)
	}
}

// rotateStory is a rotation with checkpoints before and after it, on a disk that fails.
func rotateStory(h *history, keys *kept, ring *Ring) {
	var lost *Ring
	s, err := Open(Options{
		Dir: "store", Logger: quiet(), Workers: 1, files: h.fs, LoadRing: func() (*Ring, error) { return ring, nil },
		SaveRing: func(r *Ring) error {
			h.fs.mu.Lock()
			defer h.fs.mu.Unlock()
			if err := h.fs.step("save the ring"); err != nil {
				lost = r
				return err
			}
			return keys.save(r)
		},
	})
	if err != nil {
		return
	}
	h.s = s
	h.put(0, "k1")
	s.RotateKey() //nolint:errcheck // what counts is what is left
	h.put(2, "k1")
	for range 100 {
		if st, err := s.Reseal(h.t.Context(), 1); err == nil && st.Done {
			break
		} else if h.fs.crashed {
			break
		}
	}
	h.put(3, "k2")
	s.Close() //nolint:errcheck // never fails
	// A power cut while the ring is replaced leaves either.
	if lost != nil && h.fs.steps%2 == 0 {
		keys.save(lost) //nolint:errcheck // it has no error to return
	}
}

func TestPowerCutWhileRotating(t *testing.T) {
	contents := crashContents(t)
	for k := 1; ; k++ {
		disk, keys := newFaultFS(), newKept(t)
		disk.failAt, disk.crash = k, true
		h := newHistory(t, disk, contents)
		rotateStory(h, keys, keys.ring(t))
		for seed := range uint64(3) {
			var r *rand.Rand
			if seed > 0 {
				r = rand.New(rand.NewPCG(uint64(k), seed))
			}
			after := *h
			after.fs, after.ring = disk.reboot(r), keys
			after.check(fmt.Sprintf("step %d (%s), reboot %d", k, disk.failed, seed))
		}
		if !disk.crashed {
			if k < 40 {
				t.Fatalf("the story has only %d steps", k)
			}
			return
		}
	}
}

func TestErrorWhileRotating(t *testing.T) {
	contents := crashContents(t)
	for k := 1; ; k++ {
		disk, keys := newFaultFS(), newKept(t)
		disk.failAt, disk.fault = k, errors.New("input/output error")
		h := newHistory(t, disk, contents)
		rotateStory(h, keys, keys.ring(t))
		h.ring = keys
		h.check(fmt.Sprintf("an error at step %d (%s)", k, disk.failed))
		if disk.failed == "" {
			return
		}
	}
}

// TestKeyStaysForDamaged: a pack that can't be sealed anew keeps its key.
func TestKeyStaysForDamaged(t *testing.T) {
	contents, dir, keys := crashContents(t), t.TempDir(), newKept(t)
	s := openStore(t, dir, keys.use(t))
	a, _ := mustPut(t, s, meta("k1"), contents[0])
	b, _ := mustPut(t, s, meta("k2"), contents[2])
	packs, err := filepath.Glob(filepath.Join(dir, "org_a", "packs", "*.pack"))
	if err != nil || len(packs) != 2 {
		t.Fatal(packs, err)
	}
	slices.Sort(packs)
	raw, err := os.ReadFile(packs[1]) // of b alone
	if err != nil {
		t.Fatal(err)
	}
	raw[packHead+100] ^= 1
	if err := os.WriteFile(packs[1], raw, 0o600); err != nil {
		t.Fatal(err)
	}
	mustRotate(t, s)
	st := resealAll(t, s, 1<<30)
	if st.Stuck != 1 || st.Packs != 1 || len(st.Dropped) != 0 || !errors.Is(st.Why, ErrDamaged) {
		t.Fatalf("Reseal: %+v", st)
	}
	if list := mustKeys(t, s); len(list) != 2 || list[0].Packs != 1 {
		t.Errorf("keys: %+v", list)
	}
	mustRestore(t, s, a.ID, contents[0])
	if err := s.Delete(b.ID); err != nil {
		t.Fatal(err)
	}
	collectAll(t, s)
	if st := resealAll(t, s, 1<<30); len(st.Dropped) != 1 || st.Stuck != 0 {
		t.Errorf("after the damaged one was deleted: %+v", st)
	}
	mustRestore(t, s, a.ID, contents[0])
}

func TestRotateThatIsNotSaved(t *testing.T) {
	contents, keys := crashContents(t), newKept(t)
	s := openStore(t, t.TempDir(), keys.use(t))
	a, _ := mustPut(t, s, meta("k1"), contents[0])
	keys.err = errors.New("no space left")
	if _, err := s.RotateKey(); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Fatal(err)
	}
	mustRestore(t, s, a.ID, contents[0])
	mustPut(t, s, meta("k1"), contents[1])
	// Which ring counts after a restart is not known now, so no organization is added.
	if _, _, err := s.Put(t.Context(), Meta{Organization: "org_b", Kernel: "k"}, []Tree{{"images", contents[1]}}); err == nil || !strings.Contains(err.Error(), "rotate it again") {
		t.Errorf("a new organization: %v", err)
	}
	keys.err = nil
	mustRotate(t, s)
	mustPut(t, s, Meta{Organization: "org_b", Kernel: "k"}, contents[1])
	for range maxRing - 2 {
		mustRotate(t, s)
	}
	if _, err := s.RotateKey(); err == nil || !strings.Contains(err.Error(), "wait until") {
		t.Errorf("rotation number %d: %v", maxRing, err)
	}
	resealAll(t, s, 1<<30)
	mustRotate(t, s)
	mustRestore(t, s, a.ID, contents[0])
}

func TestRingFile(t *testing.T) {
	r, err := ringOf(testKey, time.Unix(1_700_000_000, 0))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := r.Encode(); err != nil || !bytes.Equal(b, testKey[:]) {
		t.Errorf("a key that was never rotated is kept as %d bytes, %v", len(b), err)
	}
	r2, err := r.rotated([]string{"org_a"})
	if err != nil {
		t.Fatal(err)
	}
	good, err := r2.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if back, err := ParseRing(good, time.Time{}); err != nil || back.newest() != r2.newest() || back.keys[0] != r2.keys[0] || back.hash != r2.hash || back.hashes["org_a"] != r2.hashes["org_a"] {
		t.Errorf("the ring comes back changed: %v", err)
	}
	key := string(good[bytes.Index(good, []byte(`"key": "`))+8:])[:20]
	for what, bad := range map[string][]byte{
		"empty":      nil,
		"short":      good[:len(good)/2],
		"31 bytes":   make([]byte, 31),
		"version":    bytes.Replace(good, []byte(`"version": 1`), []byte(`"version": 2`), 1),
		"other id":   bytes.Replace(good, []byte(r2.keys[0].id.String()), []byte("0123456789abcdef"), 1),
		"no keys":    []byte(`{"version":1,"keys":[],"hash":""}`),
		"field":      bytes.Replace(good, []byte(`"version"`), []byte(`"more":1,"version"`), 1),
		"cut key":    bytes.Replace(good, []byte(key), []byte(key[:16]), 1),
		"other text": []byte("hello"),
	} {
		_, err := ParseRing(bad, time.Time{})
		if err == nil || strings.Contains(err.Error(), key) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", what, err)
		}
	}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("ring", "ring", r2)
	asJSON, err := json.Marshal(map[string]any{"r": r2})
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{log.String(), string(asJSON), fmt.Sprintf("%v %+v %s %#v", r2, r2, r2, r2)} {
		if !strings.Contains(text, "redacted") || strings.Contains(text, "keys") {
			t.Errorf("a ring shows itself as %s", text)
		}
	}
}
