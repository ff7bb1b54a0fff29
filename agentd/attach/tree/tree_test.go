package tree

import (
	"fmt"
	"math/rand"
	"reflect"
	"testing"
)

// random makes a state by random changes, and returns the journal of it.
func random(seed int64, n int) (*State, [][]byte) {
	r := rand.New(rand.NewSource(seed))
	s := New()
	dirs, files := []uint64{Root}, []uint64{}
	var entries [][]byte
	for i := range n {
		b := s.Batch()
		dir := dirs[r.Intn(len(dirs))]
		name := fmt.Sprint("name-", r.Intn(50))
		switch r.Intn(8) {
		case 0, 1, 2:
			if s.Node(dir).Dir.Lookup(name) != 0 {
				continue
			}
			node := &Node{ID: uint64(i + 10), Type: File, Mode: uint16(r.Intn(0o2000)), Size: r.Uint64(), Mtime: -5, Links: 1, Flags: Flags(r.Intn(128))}
			if r.Intn(3) == 0 {
				node.Type = Directory
				dirs = append(dirs, node.ID)
			} else {
				files = append(files, node.ID)
			}
			b.Put(node)
			b.Link(dir, name, node.ID)
		case 3:
			if id := s.Node(dir).Dir.Lookup(name); id != 0 && s.Node(id).Type == File {
				b.Unlink(dir, name)
			}
		case 4:
			if len(files) > 0 && s.Node(dir).Dir.Lookup(name) == 0 {
				b.Link(dir, name, files[r.Intn(len(files))])
			}
		case 5:
			b.Enqueue(Op{Number: s.Meta().NextOp, ID: dir, Dirs: [2]uint64{dir}, Body: []byte(name), Content: r.Intn(2) == 0})
			if r.Intn(10) == 0 {
				b.Confirm(s.Meta().NextOp - 3)
			}
		case 6:
			m := s.Meta()
			m.Seq, m.WorkspaceID, m.IDs = uint64(i), "w", [][2]uint64{{uint64(i), uint64(i + 5)}}
			b.Meta(m)
			b.Reply(Reply{Unique: uint64(i), ID: dir})
			b.Loaded(dir, r.Intn(2) == 0)
		case 7:
			c := s.Node(dir).Clone()
			c.Xattrs = c.WithXattr("user."+name, []byte(name))
			b.Put(c)
			b.Content(dir, []byte(name))
		}
		entries = append(entries, b.Bytes())
	}
	return s, entries
}

func sameState(t *testing.T, what string, got, want *State) {
	t.Helper()
	if !reflect.DeepEqual(got.meta, want.meta) || !reflect.DeepEqual(got.touched, want.touched) || !reflect.DeepEqual(got.replies, want.replies) {
		t.Errorf("%s: %+v, want %+v", what, got.meta, want.meta)
	}
	if len(got.queue) != len(want.queue) || len(got.queue) > 0 && !reflect.DeepEqual(got.queue, want.queue) {
		t.Errorf("%s: %d operations, want %d", what, len(got.queue), len(want.queue))
	}
	if len(got.nodes) != len(want.nodes) {
		t.Fatalf("%s: %d nodes, want %d", what, len(got.nodes), len(want.nodes))
	}
	for id, w := range want.nodes {
		g := got.nodes[id]
		gd, wd := g.Dir, w.Dir
		gc, wc := *g, *w
		gc.Dir, wc.Dir = nil, nil
		if wc.Type != Directory {
			gc.Parent, wc.Parent = 0, 0 // some directory that had it
		}
		if !reflect.DeepEqual(gc, wc) {
			t.Errorf("%s: node %+v, want %+v", what, gc, wc)
		}
		if (gd == nil) != (wd == nil) {
			t.Fatalf("%s: node %d is a directory only once", what, id)
		}
		if wd == nil {
			continue
		}
		if list(gd) != list(wd) || gd.Loaded != wd.Loaded || gd.subdirectories != wd.subdirectories || gd.Len() != wd.Len() {
			t.Errorf("%s: directory %d: %s, want %s", what, id, list(gd), list(wd))
		}
	}
}

// list has the cookies, too: somebody may be in the midst of reading the directory.
func list(d *Dir) (s string) {
	d.From(0, func(e Entry) bool {
		s += fmt.Sprint(e, " ")
		return true
	})
	return s
}

// TestJournalMakesTheSame: a journal, a journal that is applied twice, and a dump.
func TestJournalMakesTheSame(t *testing.T) {
	for seed := range int64(20) {
		want, entries := random(seed, 600)
		replayed := New()
		contents := 0
		for _, e := range entries {
			if err := replayed.Apply(e, func(uint64, int, int) { contents++ }); err != nil {
				t.Fatal(err)
			}
		}
		sameState(t, "replayed", replayed, want)
		if contents == 0 {
			t.Error("no content was seen")
		}
		dumped := New()
		if err := want.Dump(func(p []byte) error { return dumped.Apply(p, nil) }); err != nil {
			t.Fatal(err)
		}
		sameState(t, "dumped", dumped, want)
	}
}

func TestDirectoryKeepsPlaces(t *testing.T) {
	d := newDir()
	for i := range 200 {
		d.set(fmt.Sprint(i), uint64(i+1), 0)
	}
	var seen []uint64
	at := uint64(0)
	for step := 0; ; step++ {
		n := 0
		d.From(at, func(e Entry) bool {
			seen = append(seen, e.ID)
			at = e.Cookie
			n++
			return n < 7
		})
		if n == 0 {
			break
		}
		// Names that were listed go, and new ones come; those that stay are seen once.
		d.remove(fmt.Sprint(step * 7))
		d.remove(fmt.Sprint(step*7 + 1))
	}
	if len(seen) != 200 {
		t.Errorf("%d names were seen, want 200", len(seen))
	}
	for i, id := range seen {
		if id != uint64(i+1) {
			t.Fatalf("name %d was seen at place %d", id, i)
		}
	}
}

func FuzzApply(f *testing.F) {
	_, entries := random(1, 100)
	for _, e := range entries {
		f.Add(e)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		s := New()
		_ = s.Apply(data, func(_ uint64, offset, length int) {
			if offset < 0 || offset+length > len(data) {
				t.Errorf("content at %d+%d of %d", offset, length, len(data))
			}
		})
		_ = s.Dump(func([]byte) error { return nil })
	})
}
