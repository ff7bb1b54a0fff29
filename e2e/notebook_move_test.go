package e2e

import (
	"path/filepath"
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
		{"began(1,1) back(1) start(1) done(1) kept(2) ended(true,false)", "['a', 'e']", 1, []string{first, "items.append('e'); print(items)"}},
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

// TestNotebookWatchMoves watches a file, moves its kernel to another host while nobody watches,
// and goes on there with what was computed before.
func TestNotebookWatchMoves(t *testing.T) {
	s, _, _ := twoHosts(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "n.ipynb")
	cells := []string{"import time; first = time.time_ns(); items = []; print(first)", "items.append('b'); print(items)"}
	notebookOf(t, file, cells...)
	stop := startWatch(t, s, file, dir, s.TokenFile)
	first := awaitOutputs(t, file, "first", "text", "['b']")[0]
	stop()
	kernel, _, _ := strings.Cut(strings.Split(must(t, s, "kernel", "list"), "\n")[1], " ")
	must(t, s, "kernel", "move", kernel, "other")
	cells[1] = "items.append('there'); print(items)"
	notebookOf(t, file, cells...)
	stop = startWatch(t, s, file, dir, s.TokenFile)
	awaitOutputs(t, file, "on the other host", "[]", "['there']")
	cells = append(cells, "print(first)")
	notebookOf(t, file, cells...)
	got := awaitOutputs(t, file, "one more", "[]", "['there']", "text")[2]
	stop()
	if !strings.Contains(first, strings.Trim(strings.Split(strings.SplitN(got, `"text": [`, 2)[1], "\\n")[0], ` "`)) {
		t.Errorf("the first cell ran again: %s, before %s", got, first)
	}
	if line := where(t, s, kernel); !strings.Contains(line, "other") {
		t.Errorf("the kernel is not on the other host: %s", line)
	}
}
