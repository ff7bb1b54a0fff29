package replica

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/attach/remote/simulatedremote"
)

// TestUnsent: what is not sent is named by the paths of now; what was kept twice, by both.
func TestUnsent(t *testing.T) {
	r := simulatedremote.New()
	a, b := open(t, r, t.TempDir(), "a"), open(t, r, t.TempDir(), "b")
	mkdir(t, a, "dir")
	mkdir(t, a, "dir/sub")
	put(t, a, "dir/sub/old", []byte("x"))
	put(t, a, "gone", []byte("x"))
	put(t, a, "both", []byte("x"))
	drain(t, a)
	if got := a.Unsent(); len(got) > 0 {
		t.Errorf("although all is sent: %q", got)
	}
	if _, err := get(b, 1, "both"); err != nil {
		t.Fatal(err)
	}
	r.Cut(true)
	put(t, a, "dir/sub/old", []byte("y"))
	put(t, a, "dir/sub/new \xff", []byte("y"))
	dir, name := walk(t, a, "dir/sub/old")
	if err := a.Rename(ctx, Caller{}, dir, name, dir, "renamed", 0); err != nil {
		t.Fatal(err)
	}
	if err := a.Remove(ctx, Caller{}, 1, "gone", false); err != nil {
		t.Fatal(err)
	}
	put(t, a, "both", []byte("from a"))
	want := []string{"/dir/sub/renamed", "/dir/sub/new \xff", "/gone", "/both"}
	if got := a.Unsent(); !slices.Equal(got, want) {
		t.Errorf("unsent: %q, want %q", got, want)
	}
	for i := range 2 * MaxUnsentPaths {
		if _, err := a.Make(ctx, Caller{}, 1, fmt.Sprint("many", i), Make{Type: 2, Mode: 0o755}); err != nil {
			t.Fatal(err)
		}
	}
	if got := a.Unsent(); len(got) != MaxUnsentPaths {
		t.Errorf("%d paths are told", len(got))
	}
	// The other host comes first; what is made here is kept beside it.
	r.Cut(false)
	put(t, b, "both", []byte("from b"))
	drain(t, b)
	drain(t, a)
	both := append(a.Conflicts(), b.Conflicts()...)
	if len(both) != 1 || both[0].Path != "/both" || !strings.HasPrefix(both[0].KeptAs, "/both (conflict") || time.Since(time.Unix(0, both[0].TimeNs)) > time.Hour {
		t.Errorf("conflicts: %+v", both)
	}
	if got := a.Unsent(); len(got) > 0 {
		t.Errorf("although all is sent: %q", got)
	}
	if err := a.Remove(ctx, Caller{}, 1, "gone", false); err != syscall.ENOENT {
		t.Error(err)
	}
}
