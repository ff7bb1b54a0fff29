package workspace_test

import (
	"reflect"
	"strings"
	"testing"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestRename(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		k := newKit(t, s)
		k.put("w", "/readme", "hello")
		a, b := k.host("alpha", "w"), k.host("beta", "w")
		d, e, f, g := a.newID(), a.newID(), a.newID(), a.newID()
		a.ok(create(d, 1, "d", isDir), create(e, d, "e", isDir), create(f, e, "f", isFile), write(f, 0, "F"), create(g, 1, "g", isFile), write(g, 0, "G"))

		// Over a file that both know.
		a.ok(rename(f, e, "f", 1, "g", g))
		k.want("w", "/g", "F")
		// Over one that beta has made meanwhile: the name goes to who was first.
		x := b.newID()
		b.ok(create(x, 1, "new", isFile), write(x, 0, "X"))
		r := a.do(rename(f, 1, "g", 1, "new", 0))
		if r[0].Conflict == nil || !strings.HasPrefix(string(r[0].Conflict.KeptAs), "/new (conflict alpha ") {
			t.Fatalf("no conflict: %v", r[0])
		}
		k.want("w", "/new", "X")
		// Somebody else moved it: the later wins.
		b.ok(rename(x, 1, "new", d, "theirs", 0))
		a.ok(rename(x, 1, "new", e, "mine", 0))
		k.want("w", "/d/e/mine", "X")
		// A directory into itself.
		if r := a.do(rename(d, 1, "d", e, "loop", 0)); r[0].Refused == "" {
			t.Errorf("a loop was made: %v", r[0])
		}
		// Swapped.
		y := a.newID()
		swap := rename(x, e, "mine", 1, "y", 0)
		swap.GetRename().Exchange, swap.GetRename().Replaces = true, y
		a.ok(create(y, 1, "y", isDir), swap)
		if got, want := k.tree("w"), []string{"/d/", "/d/e/", "/d/e/mine/", "/new (conflict", "/readme", "/y"}; len(got) != len(want) || got[2] != want[2] || !strings.HasPrefix(got[3], want[3]) || got[5] != want[5] {
			t.Errorf("got %q, want %q", got, want)
		}
		// What another removed comes back where the host put it.
		b.ok(remove(x, 1, "y"))
		a.ok(rename(x, 1, "y", 1, "kept", 0))
		k.want("w", "/kept", "X")
		// Names of one file.
		link := func(id, parent uint64, name string) *posternv1.FileOp {
			return &posternv1.FileOp{Op: &posternv1.FileOp_MakeLink_{MakeLink: &posternv1.FileOp_MakeLink{Id: id, Parent: parent, Name: []byte(name)}}}
		}
		a.ok(link(x, 1, "l1"), link(x, d, "l2"), link(x, 1, "l1"), remove(x, 1, "kept"))
		k.want("w", "/l1", "X")
		k.want("w", "/d/l2", "X")
		a.ok(write(x, 1, "XX"), remove(x, 1, "l1"))
		k.want("w", "/d/l2", "XX")
		if got := k.tree("w"); !reflect.DeepEqual(got[:4], []string{"/d/", "/d/e/", "/d/e/mine/", "/d/l2"}) {
			t.Errorf("got %q", got)
		}
	})
}
