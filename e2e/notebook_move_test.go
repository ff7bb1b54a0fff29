package e2e

import (
	"strings"
	"testing"
)

// TestNotebookMoves goes on with a notebook on the host that its kernel was moved to, and
// runs only what an edit makes stale there.
func TestNotebookMoves(t *testing.T) {
	s, _, _ := twoHosts(t)
	n := notebookAPI{t, api(t, s)}
	first, second := "items = ['a']; print(items)", "items.append('b'); print(items)"
	got := n.sync(t.Context(), "", nil, first, second)
	if got.err != nil || !strings.HasSuffix(got.String(), "ended(true,false)") {
		t.Fatalf("%s, %v", got, got.err)
	}
	kernel := got.kernel
	must(t, s, "kernel", "move", kernel, "other")
	for _, step := range []struct {
		events, output string
		cell           uint32
		sources        []string
	}{
		{"began(2,1) back(2) start(2) done(2) kept(3) ended(true,false)", "['a', 'b', 'c']", 2, []string{first, second, "items.append('c'); print(items)"}},
		{"began(2,1) back(2) start(2) done(2) kept(3) ended(true,false)", "['a', 'b', 'd']", 2, []string{first, second, "items.append('d'); print(items)"}},
		// The checkpoint before it stayed on the other host: all runs again.
		{"began(1,1) back(0) start(0) done(0) kept(1) start(1) done(1) kept(2) ended(true,false)", "['a', 'e']", 1, []string{first, "items.append('e'); print(items)"}},
	} {
		got := n.sync(t.Context(), kernel, nil, step.sources...)
		if got.err != nil || got.String() != step.events || !strings.Contains(got.outputs[step.cell], step.output) {
			t.Errorf("%q:\ngot  %s, %v, %v\nwant %s, %s", step.sources, got, got.outputs, got.err, step.events, step.output)
		}
	}
	if line := where(t, s, kernel); !strings.Contains(line, "other") {
		t.Errorf("the kernel is not on the other host: %s", line)
	}
}
