package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
	"github.com/postern-dev/postern/client/notebookfile"
	"github.com/postern-dev/postern/e2e/stack"
)

// checkpointBinaries are the programs with an agentd that can checkpoint where
// CAP_SYS_RESOURCE is missing: see package criutest.
func checkpointBinaries(t *testing.T) string {
	t.Helper()
	needRoot(t)
	criutest.Path(t)
	plain, dir := binaries(t), shortDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"controlplane", "postern"} {
		if err := os.Symlink(filepath.Join(plain, name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.Command("go", "build", "-tags", "posterncriushim", "-o", filepath.Join(dir, "agentd"), "./agentd")
	build.Dir, build.Env = "..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build agentd: %v\n%s", err, out)
	}
	if lib := criutest.Preload(t); lib != "" {
		text, err := os.ReadFile(lib)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "criu-preload.so"), text, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// notebookOf writes a notebook file as an editor does: another one over it.
func notebookOf(t *testing.T, path string, cells ...string) {
	t.Helper()
	type cell struct {
		ID       string         `json:"id"`
		Kind     string         `json:"cell_type"`
		Count    *int           `json:"execution_count"`
		Metadata map[string]any `json:"metadata"`
		Outputs  []any          `json:"outputs"`
		Source   string         `json:"source"`
	}
	file := map[string]any{"nbformat": 4, "nbformat_minor": 5, "metadata": map[string]any{"kernelspec": map[string]any{"name": "python3", "display_name": "Python 3"}}}
	var all []cell
	for i, source := range cells {
		all = append(all, cell{ID: string(rune('a' + i)), Kind: "code", Metadata: map[string]any{}, Outputs: []any{}, Source: source})
	}
	file["cells"] = all
	text, err := json.MarshalIndent(file, "", " ")
	if err == nil {
		err = os.WriteFile(path+"~", append(text, '\n'), 0o644)
	}
	if err == nil {
		err = os.Rename(path+"~", path)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// outputsOf are the outputs of a notebook's code cells, as JSON.
func outputsOf(t *testing.T, path string) []string {
	t.Helper()
	d, err := notebookfile.Read(path)
	if err != nil {
		return nil // it is being replaced by something else
	}
	var out []string
	for _, i := range d.Code() {
		out = append(out, strings.Join(strings.Fields(string(d.Cells[i].Outputs)), " "))
	}
	return out
}

func TestNotebookRun(t *testing.T) {
	s, _ := withKernels(t)
	file := filepath.Join(t.TempDir(), "n.ipynb")
	notebookOf(t, file, "x = 6", "print('hello')\nx * 7", "import sys; print('oh', file=sys.stderr); 1/0", "print('never')")
	e := postern(t, s, "notebook", "run", file, "--agent", "host")
	if e.code != 1 || !strings.Contains(e.stderr, "code cell 3 failed: ZeroDivisionError: division by zero") {
		t.Errorf("exit code %d: %s", e.code, e.stderr)
	}
	got := outputsOf(t, file)
	for i, want := range []string{"[]", `"42"`, `"ename": "ZeroDivisionError"`, "[]"} {
		if !strings.Contains(got[i], want) {
			t.Errorf("cell %d has %s, want %s", i+1, got[i], want)
		}
	}
	if !strings.Contains(got[1], `"hello\n"`) || !strings.Contains(got[2], `"oh\n"`) {
		t.Errorf("got %q", got)
	}
	notebookOf(t, file, "import time; time.sleep(600)")
	if e := postern(t, s, "notebook", "run", file, "--agent", "host", "--timeout", "1s"); e.code != 1 || !strings.Contains(e.stderr, "ran longer than 1s") {
		t.Errorf("a slow cell: exit code %d: %s", e.code, e.stderr)
	}
	if e := postern(t, s, "notebook", "run", file+".nix", "--agent", "host"); e.code == 0 || !strings.Contains(e.stderr, "no such file") {
		t.Errorf("no file: exit code %d: %s", e.code, e.stderr)
	}
	if left := must(t, s, "kernel", "list", "-o", "json"); strings.TrimSpace(left) != "[]" {
		t.Errorf("kernels are left:\n%s", left)
	}

	// A kernel that is told to stop on an error drops what comes right after it.
	var cells []string
	for i := range 10 {
		cells = append(cells, "1/0", fmt.Sprintf("print('cell', %d)", i))
	}
	notebookOf(t, file, cells...)
	e = postern(t, s, "notebook", "run", file, "--agent", "host", "--allow-errors")
	if e.code != 1 {
		t.Errorf("exit code %d: %s", e.code, e.stderr)
	}
	got = outputsOf(t, file)
	for i := range 10 {
		if want := fmt.Sprintf("cell %d", i); !strings.Contains(got[2*i], "ZeroDivisionError") || !strings.Contains(got[2*i+1], want) {
			t.Errorf("around %s: %s, %s", want, got[2*i], got[2*i+1])
		}
	}
}

// startWatch starts postern notebook watch; stop ends it with Ctrl-C. home is the user's.
func startWatch(t *testing.T, s *stack.Stack, file, home, token string, args ...string) (stop func()) {
	t.Helper()
	cmd := exec.Command(filepath.Join(s.Bin, "postern"), append([]string{"notebook", "watch", file, "--agent", "host", "--url", s.URL, "--token-file", token}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+home, "XDG_STATE_HOME="+filepath.Join(home, "state"))
	said := &strings.Builder{}
	cmd.Stderr = said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	stop = func() {
		if ended {
			return
		}
		ended = true
		if err := cmd.Process.Signal(syscall.SIGINT); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the watch ended with %v: %s", err, said)
		}
		t.Logf("the watch said:\n%s", said)
	}
	t.Cleanup(stop)
	return stop
}

// awaitOutputs waits until the outputs of a notebook's cells have these texts in them.
func awaitOutputs(t *testing.T, file, what string, want ...string) []string {
	t.Helper()
	var got []string
	deadline := time.Now().Add(4 * time.Minute)
	for time.Now().Before(deadline) {
		got = outputsOf(t, file)
		good := len(got) == len(want)
		for i := range want {
			good = good && strings.Contains(got[i], want[i])
		}
		if good {
			return got
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("%s: the outputs are %q, want %q", what, got, want)
	return nil
}

// TestNotebookWatchInPlace edits a notebook as editors do that do not put another file
// over it: they truncate and write, at once, slowly, or within the old text, and keep
// their descriptor open.
func TestNotebookWatchInPlace(t *testing.T) {
	s, _ := withKernels(t)
	dir := t.TempDir()
	file, next := filepath.Join(dir, "n.ipynb"), filepath.Join(dir, "next")
	notebookOf(t, file, "x = 'one'", "print(x)")
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	stop := startWatch(t, s, file, dir, s.TokenFile, "--no-checkpoints", "--stop")
	awaitOutputs(t, file, "first", "[]", `"one\n"`)
	for _, way := range []struct{ name, script string }{
		{"truncate and write", `cat next > n.ipynb`},
		{"truncate, wait, and write in pieces", `n=$(($(wc -c < next) / 2)); { sleep 0.4; head -c $n next; sleep 0.4; tail -c +$(($n + 1)) next; } > n.ipynb`},
		{"write over the old text, then cut", `dd if=next of=n.ipynb conv=notrunc status=none; sleep 0.2; truncate -s $(wc -c < next) n.ipynb`},
		{"a descriptor that stays open", `exec 3<> n.ipynb; truncate -s 0 n.ipynb; cat next >&3; sleep 1`},
		{"many saves", `for i in 1 2 3 4 5 6 7 8 9 10; do cat next > n.ipynb; sleep 0.03; done`},
		{"a copy over it", `cp next n.ipynb; sync n.ipynb`},
	} {
		t.Run(way.name, func(t *testing.T) {
			notebookOf(t, next, "x = '"+way.name+"'", "print(x)", "print(x.upper())")
			cmd := exec.Command("sh", "-ec", way.script)
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			awaitOutputs(t, file, way.name, "[]", `"`+way.name+`\n"`, `"`+strings.ToUpper(way.name)+`\n"`)
		})
	}
	stop()
	if now, err := os.Stat(file); err != nil || now.Mode() != info.Mode() {
		t.Errorf("the file's mode is %v, %v, want %v", now.Mode(), err, info.Mode())
	}
	if rest, err := filepath.Glob(filepath.Join(dir, ".*.tmp")); err != nil || len(rest) > 0 {
		t.Errorf("left behind: %v, %v", rest, err)
	}
}

// TestNotebookWatch edits a notebook while it is watched: only what an edit makes stale
// runs again, from the state before it; and the next watch goes on where this one was,
// after agentd was killed.
func TestNotebookWatch(t *testing.T) {
	s, a := withKernelsOf(t, stack.Options{Bin: checkpointBinaries(t)})
	dir := t.TempDir()
	file, token := filepath.Join(dir, "n.ipynb"), s.TokenFile
	// The first cell tells how often it ran, by a file that checkpoints of the kernel's
	// memory do not undo: the clock.
	cells := []string{"import time; first = time.time_ns(); items = []; print(first)", "items.append('b'); print(items)", "items.append('c'); print(items)"}
	notebookOf(t, file, cells...)
	watch := func() (stop func()) {
		t.Helper()
		return startWatch(t, s, file, dir, token)
	}
	await := func(what string, want ...string) []string {
		t.Helper()
		return awaitOutputs(t, file, what, want...)
	}
	stop := watch()
	first := await("first", "text", "['b']", "['b', 'c']")[0]
	cells[1] = "items.append('x'); print(items)"
	notebookOf(t, file, cells...)
	if got := await("changed", "text", "['x']", "['x', 'c']"); got[0] != first {
		t.Errorf("the first cell ran again: %s, before %s", got[0], first)
	}
	cells = []string{cells[0], "items.append('new'); print(items)", cells[1], cells[2]}
	notebookOf(t, file, cells...)
	await("added", first, "['new']", "['new', 'x']", "['new', 'x', 'c']")
	cells = []string{cells[0], cells[2], "raise ValueError('no')"}
	notebookOf(t, file, cells...)
	await("removed, and one that fails", first, "['x']", "ValueError")
	stop()
	if state := must(t, s, "kernel", "list"); !strings.Contains(state, "suspended") {
		t.Errorf("the kernel is not suspended: %s", state)
	}
	history := func() string {
		cmd := exec.Command(filepath.Join(s.Bin, "postern"), "notebook", "history", file, "--agent", "host", "--url", s.URL, "--token-file", token)
		cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_STATE_HOME="+filepath.Join(dir, "state"))
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("history: %v", err)
		}
		return string(out)
	}
	if tree := history(); !strings.Contains(tree, "start") || !strings.Contains(tree, "after cell 2") {
		t.Errorf("history:\n%s", tree)
	}
	a.Process.Kill()
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	if err := a.Online(t.Context()); err != nil {
		t.Fatal(err)
	}
	cells[2] = "items.append('next day'); print(items)"
	notebookOf(t, file, cells...)
	stop = watch()
	await("the next day", "[]", "[]", "['x', 'next day']")
	stop()
}
