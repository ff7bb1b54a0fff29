package replica

import (
	"bytes"
	"fmt"
	"os"
	"testing"

	"github.com/postern-dev/postern/agentd/attach/remote/simulatedremote"
	"github.com/postern-dev/postern/agentd/attach/tree"
)

// TestLeftContents makes files whose numbers were used before a loss of power that took the word
// for them, and left their contents: nothing of those is in the new ones, which stay.
func TestLeftContents(t *testing.T) {
	const files = 200
	r := simulatedremote.New()
	dir := t.TempDir()
	a := open(t, r, dir, "a")
	put(t, a, "first", []byte("first"))
	drain(t, a)
	a.mu.Lock()
	next := a.s.Meta().IDs[0][0]
	a.mu.Unlock()
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	left := bytes.Repeat([]byte("left"), 10_000)
	for i := range uint64(files) {
		if err := os.WriteFile(a.store.Path(next+i), left, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a = open(t, r, dir, "a")
	want := map[string]string{}
	for i := range files {
		name := fmt.Sprintf("f%d", i)
		want[name] = fmt.Sprintf("content %d", i)
		put(t, a, name, []byte(want[name]))
	}
	a.sweep()
	check := func(when string) {
		t.Helper()
		for name, content := range want {
			if got, err := get(a, tree.Root, name); err != nil || string(got) != content {
				t.Fatalf("%s: %s has %d bytes, want %q (%v)", when, name, len(got), content, err)
			}
		}
	}
	check("at once")
	drain(t, a)
	a.sweep()
	check("later")
	if data, err := get(a, tree.Root, "first"); err != nil || string(data) != "first" {
		t.Errorf("%q, %v", data, err)
	}
}

// TestNothingLiesUnderNewNodes: a node gets no id under which something lies, however it is made. What a process
// after this one finds there would be its content, and what it grows by would be what lay there.
func TestNothingLiesUnderNewNodes(t *testing.T) {
	for name, c := range map[string]struct{ opened, stocked bool }{
		"creat": {true, false}, "mknod": {false, false}, "creat later": {true, true}, "mknod later": {false, true},
	} {
		t.Run(name, func(t *testing.T) {
			r := simulatedremote.New()
			dir := t.TempDir()
			a := open(t, r, dir, "a")
			if err := a.haveID(ctx); err != nil {
				t.Fatal(err)
			}
			a.mu.Lock()
			next := a.s.Meta().IDs[0][0]
			a.mu.Unlock()
			if err := a.Close(); err != nil {
				t.Fatal(err)
			}
			const left = 20
			for i := range uint64(left) {
				if err := os.WriteFile(a.store.Path(next+i), bytes.Repeat([]byte("left"), 1000), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			a = open(t, r, dir, "a")
			if c.stocked {
				eventually(t, "the cache is looked through", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.stocked })
			}
			for i := range 2 * left {
				made, err := a.Make(ctx, Caller{}, tree.Root, fmt.Sprint("f", i), Make{Type: tree.File, Mode: 0o644, Open: c.opened})
				if err != nil {
					t.Fatal(err)
				}
				if st, err := os.Stat(a.store.Path(made.ID)); err == nil && st.Size() > 0 {
					t.Errorf("file %d: %d bytes lie under its id %#x", i, st.Size(), made.ID)
				}
				size := uint64(10)
				if _, err := a.SetAttr(ctx, made.ID, SetAttr{Size: &size}); err != nil {
					t.Fatal(err)
				}
				if c.opened {
					a.Release(made.ID, true)
				}
			}
			for i := range 2 * left {
				wantContent(t, a, fmt.Sprint("f", i), make([]byte, 10))
			}
		})
	}
}

// TestDoomedButBack: a content that nobody owned is not removed when its node is there again by then.
func TestDoomedButBack(t *testing.T) {
	r := simulatedremote.New()
	a := open(t, r, t.TempDir(), "a")
	id := put(t, a, "f", []byte("here"))
	drain(t, a)
	r.Cut(true) // it is not fetched again
	a.mu.Lock()
	a.doomed[id] = true
	a.mu.Unlock()
	a.sweep()
	wantContent(t, a, "f", []byte("here"))
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.doomed) > 0 {
		t.Error("it is to be removed still")
	}
}
