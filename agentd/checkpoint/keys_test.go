package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/checkpoint/pagestore"
)

// noKernels has none.
type noKernels struct{ Kernels }

func openEngine(t *testing.T, state string) *Engine {
	t.Helper()
	e, err := Open(Config{State: state, Kernels: noKernels{}, Logger: slog.New(slog.NewTextHandler(t.Output(), nil)), Memory: filepath.Join(t.TempDir(), "memory")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() }) //nolint:errcheck // closed twice is fine
	return e
}

// imageTree is a directory with one file of this byte.
func imageTree(t *testing.T, b byte) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "pages-1.img"), bytes.Repeat([]byte{b}, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func put(t *testing.T, e *Engine, b byte) pagestore.ID {
	t.Helper()
	c, _, err := e.store.Put(t.Context(), pagestore.Meta{Organization: "org_a", Kernel: "k"}, []pagestore.Tree{{Name: "images", Dir: imageTree(t, b)}})
	if err != nil {
		t.Fatal(err)
	}
	return c.ID
}

func wantRestored(t *testing.T, e *Engine, id pagestore.ID, b byte) {
	t.Helper()
	to := t.TempDir()
	if _, err := e.store.Restore(t.Context(), id, map[string]string{"images": to}); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(to, "pages-1.img"))
	if err != nil || !bytes.Equal(got, bytes.Repeat([]byte{b}, 64<<10)) {
		t.Fatalf("%s came back changed: %v", id, err)
	}
}

// oneKey waits until the background has dropped all keys but the newest.
func oneKey(t *testing.T, e *Engine) KeyInfo {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for {
		list, err := e.Keys(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(list) == 1 {
			return list[0]
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestRotateUnderARunningEngine(t *testing.T) {
	state := t.TempDir()
	e := openEngine(t, state)
	path := filepath.Join(state, "checkpoint.key")
	old, err := os.ReadFile(path)
	if err != nil || len(old) != 32 {
		t.Fatalf("a new host's key has %d bytes: %v", len(old), err)
	}
	a := put(t, e, 'a')
	fresh, err := e.RotateKey()
	if err != nil {
		t.Fatal(err)
	}
	b := put(t, e, 'b')
	if got := oneKey(t, e); got.ID != fresh.ID || got.Checkpoints != 2 || got.Chunks != 2 {
		t.Errorf("the key that is left: %+v", got)
	}
	wantRestored(t, e, a, 'a')
	wantRestored(t, e, b, 'b')
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file of keys: %v %v", info.Mode(), err)
	}

	// While an engine has it open nobody else rotates; afterwards one can, and the next
	// engine does the rest.
	if _, err := OpenKeys(Config{State: state, Logger: slog.New(slog.DiscardHandler)}); !errors.Is(err, pagestore.ErrInUse) {
		t.Errorf("beside a running engine: %v", err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	k, err := OpenKeys(Config{State: state, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	second, err := k.Rotate()
	if err != nil {
		t.Fatal(err)
	}
	if list, err := k.List(t.Context()); err != nil || len(list) != 2 || list[0].Checkpoints != 2 || list[1].Checkpoints != 0 {
		t.Errorf("keys after a rotation without agentd: %+v, %v", list, err)
	}
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	e = openEngine(t, state)
	if got := oneKey(t, e); got.ID != second.ID {
		t.Errorf("the key that is left: %+v, want %s", got, second.ID)
	}
	wantRestored(t, e, a, 'a')
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}

	// Another key's file opens nothing, and says so; what is none is refused.
	if err := os.WriteFile(path, old, 0o600); err != nil {
		t.Fatal(err)
	}
	e = openEngine(t, state)
	if _, err := e.store.Get(a); err == nil || !strings.Contains(err.Error(), "put the right file back") {
		t.Errorf("with the file of before: %v", err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, old[:31], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{State: state, Kernels: noKernels{}, Logger: slog.New(slog.DiscardHandler), Memory: filepath.Join(t.TempDir(), "memory")}); err == nil ||
		!strings.Contains(err.Error(), "31 bytes") || strings.Contains(err.Error(), "\n") {
		t.Errorf("with a file cut short: %v", err)
	}
}

func TestNoKeysWithoutAStore(t *testing.T) {
	state := t.TempDir()
	if _, err := OpenKeys(Config{State: state, Logger: slog.New(slog.DiscardHandler)}); !errors.Is(err, ErrNoStore) {
		t.Errorf("in an empty state directory: %v", err)
	}
	if left, err := os.ReadDir(state); err != nil || len(left) != 0 {
		t.Errorf("it left %v, %v", left, err)
	}
}
