package pagestore

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/postern-dev/postern/proto"
)

// history is a sequence of operations on a store, and what was acknowledged of it.
type history struct {
	t        *testing.T
	fs       *faultFS
	s        *Store
	contents []string
	acked    map[ID]string // checkpoint to what it must restore to
	maybe    map[ID]string // Puts and Deletes that the crash, and Deletes that an error cut short
	protect  map[ID]bool
	ring     *kept   // nil: testKey
	errs     []error // of operations that were not acknowledged
}

// crashContents are trees that share chunks, so that a collection has packs to delete
// and packs to write again.
func crashContents(t *testing.T) []string {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 9))
	pages := make([][]byte, 400)
	for i := range pages {
		pages[i] = make([]byte, ChunkSize)
		for j := range pages[i] {
			pages[i][j] = byte(r.Uint32())
		}
	}
	var out []string
	for _, pick := range [][2]int{{0, 300}, {0, 60}, {250, 400}, {30, 50}} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "pages-1.img"), slices.Concat(pages[pick[0]:pick[1]]...), 0o600); err != nil {
			t.Fatal(err)
		}
		out = append(out, dir)
	}
	return out
}

func newHistory(t *testing.T, fs *faultFS, contents []string) *history {
	return &history{
		t: t, fs: fs, contents: contents,
		acked: map[ID]string{}, maybe: map[ID]string{}, protect: map[ID]bool{},
	}
}

func (h *history) open() bool {
	o := Options{Dir: "store", Key: testKey, Logger: quiet(), Workers: 2, files: h.fs}
	if h.ring != nil {
		h.ring.use(h.t)(&o)
	}
	s, err := Open(o)
	if err != nil {
		h.errs = append(h.errs, err)
		return false
	}
	h.s = s
	return true
}

func (h *history) put(content int, kernel string) ID {
	m := meta(kernel)
	m.ID = NewID()
	h.maybe[m.ID] = h.contents[content]
	_, _, err := h.s.Put(h.t.Context(), m, []Tree{{"images", h.contents[content]}})
	if err != nil {
		h.errs = append(h.errs, err)
		if !h.fs.crashed { // a Put that failed leaves nothing
			delete(h.maybe, m.ID)
		}
		return ""
	}
	delete(h.maybe, m.ID)
	h.acked[m.ID] = h.contents[content]
	return m.ID
}

func (h *history) delete(id ID) {
	if id == "" {
		return
	}
	want := h.acked[id]
	delete(h.acked, id)
	h.maybe[id] = want
	if err := h.s.Delete(id); err != nil {
		h.errs = append(h.errs, err)
		if proto.CodeOf(err) != proto.CodeNotFound {
			return // it may be there or not
		}
	}
	delete(h.maybe, id)
}

func (h *history) protectIt(id ID) {
	if id == "" {
		return
	}
	if err := h.s.Protect(id, true); err != nil {
		h.errs = append(h.errs, err)
		return
	}
	h.protect[id] = true
}

func (h *history) collect() {
	for range 1000 {
		st, err := h.s.Collect(h.t.Context(), 1)
		if err != nil {
			h.errs = append(h.errs, err)
			return
		}
		if st.Done {
			return
		}
	}
	h.t.Error("Collect is never done")
}

// run is the story: it goes on after errors, as agentd does.
func (h *history) run() {
	if !h.open() {
		return
	}
	a := h.put(0, "k1")
	b := h.put(1, "k1")
	h.protectIt(b)
	c := h.put(2, "k2")
	h.delete(a)
	h.collect()
	h.put(0, "k1")
	h.delete(c)
	h.collect()
	h.put(3, "k2")
	h.s.Close() //nolint:errcheck // never fails
}

// check opens what is left and holds it against what was acknowledged.
func (h *history) check(what string) {
	t := h.t
	t.Helper()
	h.fs.failAt = 0
	if !h.open() {
		t.Fatalf("%s: Open: %v", what, h.errs[len(h.errs)-1])
	}
	defer h.s.Close() //nolint:errcheck // never fails
	list, damagedIDs := h.s.List("org_a", "")
	if len(damagedIDs) > 0 {
		t.Fatalf("%s: damaged: %v", what, damagedIDs)
	}
	there := map[ID]Checkpoint{}
	for _, c := range list {
		there[c.ID] = c
	}
	for id, want := range h.acked {
		c, ok := there[id]
		if !ok {
			t.Fatalf("%s: the acknowledged checkpoint %s is lost", what, id)
		}
		if h.protect[id] && !c.Protected {
			t.Errorf("%s: the protection of %s is lost", what, id)
		}
		mustRestore(t, h.s, id, want)
		delete(there, id)
	}
	for id := range there {
		want, ok := h.maybe[id]
		if !ok {
			t.Fatalf("%s: checkpoint %s is there, which was deleted or failed", what, id)
		}
		mustRestore(t, h.s, id, want)
	}
	if p, err := h.s.Verify(t.Context()); err != nil || len(p) > 0 {
		t.Fatalf("%s: Verify: %v %v", what, p, err)
	}
	collectAll(t, h.s)
	for id, want := range h.acked {
		mustRestore(t, h.s, id, want)
	}
	// No orphan: when all checkpoints go, everything goes.
	for _, c := range list {
		if err := h.s.Delete(c.ID); err != nil {
			t.Fatal(err)
		}
	}
	collectAll(t, h.s)
	if left := h.fs.files(); len(left) > 0 {
		t.Fatalf("%s: orphans: %v", what, left)
	}
	if h.s.Used() != 0 {
		t.Errorf("%s: Used %d of nothing", what, h.s.Used())
	}
}

// long: POSTERN_LONG=1 has every step fail in every way.
var long = os.Getenv("POSTERN_LONG") == "1"

func TestPowerCutAtEveryStep(t *testing.T) {
	contents := crashContents(t)
	reboots := uint64(2) // all that was not synced is gone; some of it is
	if long {
		reboots = 4
	}
	for k := 1; ; k++ {
		disk := newFaultFS()
		disk.failAt, disk.crash = k, true
		h := newHistory(t, disk, contents)
		h.run()
		for seed := range reboots {
			var r *rand.Rand
			if seed > 0 {
				r = rand.New(rand.NewPCG(uint64(k), seed))
			}
			after := *h
			after.fs = disk.reboot(r)
			after.check(fmt.Sprintf("step %d (%s), reboot %d", k, disk.failed, seed))
		}
		if !disk.crashed {
			if k < 50 {
				t.Fatalf("the story has only %d steps", k)
			}
			return
		}
	}
}

// TestErrorAtEveryStep has one step fail, and wants what was acknowledged. Every other step has one errno and
// the rest the other, or, at full length, each has both.
func TestErrorAtEveryStep(t *testing.T) {
	contents := crashContents(t)
	stride := 2
	if long {
		stride = 1
	}
	for first, fault := range []error{syscall.EIO, syscall.ENOSPC} {
		for k := 1 + first*(stride-1); ; k += stride {
			disk := newFaultFS()
			disk.failAt, disk.fault = k, fault
			h := newHistory(t, disk, contents)
			h.run()
			what := fmt.Sprintf("%v at step %d (%s)", fault, k, disk.failed)
			for _, err := range h.errs {
				if err == nil || strings.Contains(err.Error(), "\n") {
					t.Errorf("%s: %v", what, err)
				}
				if fault == syscall.ENOSPC && h.s != nil && proto.CodeOf(err) != proto.CodeStorageFull && proto.CodeOf(err) != proto.CodeNotFound {
					t.Errorf("%s: %v: %v", what, proto.CodeOf(err), err)
				}
			}
			h.check(what)
			if disk.failed == "" {
				break
			}
		}
	}
}
