package sandbox

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

const python = "/usr/bin/python3"

// needRoot skips what can't be done as another user. CI is root.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := os.Stat(python); err != nil {
		t.Fatalf("%s is missing: run packaging/dev/deps.sh jupyter", python)
	}
}

// lastUID gives every kernel of the tests a user of its own: unlike those of other
// packages' tests.
var lastUID atomic.Uint32

// testSpec is a kernel that runs Python code.
func testSpec(t *testing.T, code string, args ...string) Spec {
	t.Helper()
	needRoot(t)
	n := lastUID.Add(1)
	dir := stateDir(t)
	id := strings.ToLower(filepath.Base(filepath.Dir(dir)))
	id = "test-" + strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return -1
	}, id)
	s := Spec{
		ID: id[:min(len(id), 40)] + "-" + filepath.Base(dir), UID: 1_950_000_000 + uint32(os.Getpid()%10_000)*1000 + n, GID: 1_950_000_000 + uint32(os.Getpid()%10_000)*1000 + n,
		Argv:     append([]string{python, "-u", "-c", code}, args...),
		StateDir: dir, RunDir: filepath.Join(dir, "run"), PrivateDir: filepath.Join(dir, "private"), LogFile: filepath.Join(dir, "log"),
		Network: Network{Mode: NetworkNone},
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := Cleanup(ctx, s); err != nil {
			t.Error(err)
		}
	})
	return s
}

// stateDir is a directory closed to others, as a kernel's is.
func stateDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func context30(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func start(t *testing.T, spec Spec) *Sandbox {
	t.Helper()
	s, err := Start(context30(t), spec)
	if err != nil {
		log, _ := os.ReadFile(spec.LogFile)
		t.Fatalf("%v\n%s", err, log)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.Kill(ctx); err != nil {
			t.Error(err)
		}
		s.Close()
	})
	return s
}

// run runs code to its end and returns what it printed.
func run(t *testing.T, spec Spec) (Exit, string) {
	t.Helper()
	s := start(t, spec)
	exit, err := s.Wait(context30(t))
	log, _ := os.ReadFile(spec.LogFile)
	if err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	return exit, string(log)
}

// report runs code that prints one JSON value, and decodes it.
func report(t *testing.T, spec Spec, into any) {
	t.Helper()
	exit, out := run(t, spec)
	if exit.Code != 0 {
		t.Fatalf("%s:\n%s", exit.Reason, out)
	}
	if err := json.Unmarshal([]byte(out), into); err != nil {
		t.Fatalf("%v in\n%s", err, out)
	}
}

// waitFor waits until something holds.
func waitFor(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if holds() {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

func logHas(spec Spec, text string) func() bool {
	return func() bool {
		log, _ := os.ReadFile(spec.LogFile)
		return strings.Contains(string(log), text)
	}
}

// alive says how many processes a user has, zombies not counted.
func alive(t *testing.T, uid uint32) int {
	t.Helper()
	n := 0
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		uids, err := statusField(pid, "Uid:")
		if err != nil || !slices.Contains(uids, uint64(uid)) {
			continue
		}
		if _, err := startTime(pid); err == nil {
			n++
		}
	}
	return n
}
