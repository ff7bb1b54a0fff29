package pagestore

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto"
)

// tinyTree is a directory with one file, different for each content.
func tinyTree(t testing.TB, content string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// shape writes a tree as a(b c(d)), by label.
func shape(nodes []*Node) string {
	var parts []string
	for _, n := range nodes {
		s := n.Label
		if len(n.Children) > 0 {
			s += "(" + shape(n.Children) + ")"
		}
		parts = append(parts, s)
	}
	return strings.Join(parts, " ")
}

func TestTreeListDeleteProtect(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	ids := map[string]ID{}
	for i, c := range []struct{ label, parent string }{
		{"a", ""}, {"b", "a"}, {"c", "b"}, {"d", "b"}, {"e", "d"}, {"z", "gone"},
	} {
		m := meta("k1")
		m.Label, m.Parent, m.Time = c.label, ids[c.parent], time.Unix(int64(i), 0)
		if c.parent == "gone" {
			m.Parent = NewID()
		}
		cp, _ := mustPut(t, s, m, tinyTree(t, c.label))
		ids[c.label] = cp.ID
	}
	mustPut(t, s, meta("k2"), tinyTree(t, "other"))
	check := func(want string) {
		t.Helper()
		if got := shape(s.Tree("org_a", "k1")); got != want {
			t.Errorf("tree %s, want %s", got, want)
		}
	}
	check("a(b(c d(e))) z")
	if err := s.Protect(ids["d"], true); err != nil {
		t.Fatal(err)
	}
	for _, del := range []string{"b", "a"} {
		if err := s.Delete(ids[del]); err != nil {
			t.Fatal(err)
		}
	}
	check("c d(e) z")
	used := s.Used()
	s.Close() //nolint:errcheck // only to reopen
	s = openStore(t, dir)
	if s.Used() != used {
		t.Errorf("Used was %d, and is %d after reopening", used, s.Used())
	}
	check("c d(e) z")
	if c, err := s.Get(ids["d"]); err != nil || !c.Protected {
		t.Errorf("protection is lost: %+v, %v", c, err)
	}
	if err := s.Delete(ids["b"]); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("deleted twice: %v", err)
	}
	if err := s.Protect(ids["b"], true); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("protected after deletion: %v", err)
	}
	if l, _ := s.List("org_a", ""); len(l) != 5 {
		t.Errorf("%d checkpoints of the organization, want 5", len(l))
	}
	if l, _ := s.List("org_b", ""); len(l) != 0 {
		t.Errorf("%d checkpoints of an organization without any", len(l))
	}
}

func TestRingOfParents(t *testing.T) {
	s := openStore(t, t.TempDir())
	a, b := NewID(), NewID()
	for _, m := range []Meta{{ID: a, Parent: b}, {ID: b, Parent: a}} {
		m.Organization, m.Kernel, m.Label = "org_a", "k1", "x"
		mustPut(t, s, m, tinyTree(t, string(m.ID)))
	}
	if got := shape(s.Tree("org_a", "k1")); got != "x x" {
		t.Errorf("tree %s", got)
	}
	for _, id := range []ID{a, b} {
		if err := s.Delete(id); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPolicy(t *testing.T) {
	now := time.Unix(1_000_000*3600, 0)
	var list []Checkpoint // one each 20 minutes, the newest of them now
	for i := range 12 {
		list = append(list, Checkpoint{Meta: Meta{ID: ID(fmt.Sprint(i)), Time: now.Add(time.Duration(i-11) * 20 * time.Minute), Protected: i == 1}})
	}
	for _, c := range []struct {
		name   string
		policy Policy
		kept   string
	}{
		{"all", Policy{}, "0 1 2 3 4 5 6 7 8 9 10 11"},
		{"last 3", Policy{Last: 3}, "1 9 10 11"},
		{"each hour", Policy{Every: time.Hour}, "1 4 7 10 11"},
		{"last 2 and each hour", Policy{Last: 2, Every: time.Hour}, "1 4 7 10 11"},
		{"an hour", Policy{MaxAge: time.Hour}, "1 8 9 10 11"},
		{"each hour, 90 minutes", Policy{Every: time.Hour, MaxAge: 90 * time.Minute}, "1 7 10 11"},
		{"a second", Policy{MaxAge: 1}, "1 11"},
	} {
		gone := c.policy.expired(list, now)
		var kept []string
		for _, cp := range list {
			if !slices.Contains(gone, cp.ID) {
				kept = append(kept, string(cp.ID))
			}
		}
		if got := strings.Join(kept, " "); got != c.kept {
			t.Errorf("%s: kept %s, want %s", c.name, got, c.kept)
		}
	}
}

func TestRetain(t *testing.T) {
	s := openStore(t, t.TempDir())
	for i := range 5 {
		m := meta("k1")
		m.Label, m.Time = fmt.Sprint(i), time.Unix(int64(i), 0)
		mustPut(t, s, m, tinyTree(t, m.Label))
	}
	other, _ := mustPut(t, s, meta("k2"), tinyTree(t, "other"))
	gone, err := s.Retain(t.Context(), "org_a", "k1", Policy{Last: 2})
	if err != nil || len(gone) != 3 {
		t.Errorf("deleted %v, %v", gone, err)
	}
	if got := shape(s.Tree("org_a", "k1")); got != "3 4" {
		t.Errorf("left: %s", got)
	}
	if _, err := s.Get(other.ID); err != nil {
		t.Error(err)
	}
}
