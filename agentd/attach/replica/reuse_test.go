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
