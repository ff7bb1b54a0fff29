package shim

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// processesGone waits for processes to end.
func processesGone(t *testing.T, d Detail, p *os.Process) {
	t.Helper()
	if _, err := p.Wait(); err != nil { // returns when the shim has ended
		t.Error(err)
	}
	waitFor(t, "the kernel's end", func() bool { return errors.Is(unix.Kill(d.InitPID, 0), unix.ESRCH) })
}

// A shim whose directory is deleted, whatever is left of it, ends its kernel and itself.
func TestDirectoryDeleted(t *testing.T) {
	for name, remove := range map[string]func(dir string) error{
		"all of it":      os.RemoveAll,
		"spec.json":      func(dir string) error { return os.Remove(filepath.Join(dir, specFile)) },
		"renamed before": func(dir string) error { return errors.Join(os.Rename(dir, dir+".old"), os.RemoveAll(dir+".old")) },
	} {
		t.Run(name, func(t *testing.T) {
			parent := t.TempDir()
			old, spec := newSpec(t)
			dir := filepath.Join(parent, "kernel")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			spec.Places(dir)
			if err := errors.Join(WriteSpec(dir, spec), os.Remove(filepath.Join(old, specFile))); err != nil {
				t.Fatal(err)
			}
			a, process := spawn(t, dir)
			attach(t, a, "one").run("1")
			d, err := a.Detail(soon(t))
			if err != nil {
				t.Fatal(err)
			}
			if err := remove(dir); err != nil {
				t.Fatal(err)
			}
			processesGone(t, d, process)
		})
	}
}

// A shim whose socket is gone leaves its kernel to the next one; a directory that has
// another name is the same directory.
func TestSocketRemoved(t *testing.T) {
	dir, _ := newSpec(t)
	a, process := spawn(t, dir)
	attach(t, a, "one").run("x = 'kept'")
	before, err := a.Detail(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, socketFile)); err != nil {
		t.Fatal(err)
	}
	if state, err := process.Wait(); err != nil || state.Success() {
		t.Errorf("the shim ended with %v, %v", state, err)
	}
	text, err := os.ReadFile(filepath.Join(dir, logFile))
	if err != nil || !strings.Contains(string(text), errSocketLost.Error()) {
		t.Errorf("the log has %s, %v", text, err)
	}
	a, _ = spawn(t, dir)
	if got := attach(t, a, "one", resume).run("print(x)"); got != "kept\n" {
		t.Errorf("printed %q", got)
	}
	if after, err := a.Detail(soon(t)); err != nil || after.InitPID != before.InitPID {
		t.Errorf("the kernel was %+v and is %+v, %v", before, after, err)
	}
}

func TestPlace(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "kernel")
	put := func() {
		t.Helper()
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{socketFile, specFile} {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	put()
	p, err := openPlace(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer p.dir.Close() //nolint:errcheck // it was looked at
	check := func(what string, wantDeleted, wantOurs bool) {
		t.Helper()
		if deleted, ours := p.look(); deleted != wantDeleted || ours != wantOurs {
			t.Errorf("%s: deleted %v, ours %v", what, deleted, ours)
		}
	}
	check("as it was", false, true)
	if err := os.Rename(dir, dir+".moved"); err != nil {
		t.Fatal(err)
	}
	check("under another name", false, true)
	if err := os.Rename(dir+".moved", dir); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, socketFile)
	if err := os.Rename(socket, socket+".old"); err != nil { // its inode stays taken
		t.Fatal(err)
	}
	check("without the socket", false, false)
	put()
	check("with another one", false, false)
	if err := os.Rename(socket+".old", socket); err != nil {
		t.Fatal(err)
	}
	check("with ours again", false, true)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	check("deleted", true, false)
	put()
	check("deleted, and made anew", true, false)
}

// A kernel of the pool does not outlive its agentd for long; one that is somebody's does.
func TestAlone(t *testing.T) {
	now := time.Now()
	later := now.Add(maxAlone + time.Second)
	for name, test := range map[string]struct {
		id       string
		watchers int
		deleted  bool
		at       time.Time
		want     string
	}{
		"pool, at first":         {at: now},
		"pool, watched":          {watchers: 1, at: later},
		"pool, alone":            {at: later, want: "its agentd has gone"},
		"somebody's, alone":      {id: "x", at: now.Add(1000 * time.Hour)},
		"somebody's, deleted":    {id: "x", deleted: true, watchers: 1, at: now, want: "deleted"},
		"pool, watched, deleted": {deleted: true, watchers: 1, at: now, want: "deleted"},
	} {
		t.Run(name, func(t *testing.T) {
			s := &Shim{watched: now, watchers: test.watchers, spec: Spec{ID: test.id}}
			if got := s.abandoned(test.deleted, test.at); !strings.Contains(got, test.want) || (got == "") != (test.want == "") {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
	// Watching counts.
	dir, _ := newSpec(t)
	s, err := Open(t.Context(), dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	left := s.watchedBy()
	if got := s.alone(time.Now().Add(time.Hour)); got != 0 {
		t.Errorf("alone for %s while it is watched", got)
	}
	left()
	if got := s.alone(time.Now()); got > time.Minute {
		t.Errorf("alone for %s right after", got)
	}
	if err := s.Stop(soon(t)); err != nil {
		t.Error(err)
	}
}
