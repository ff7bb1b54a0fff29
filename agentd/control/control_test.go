package control

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
)

func TestAsk(t *testing.T) {
	dir := t.TempDir()
	ctx := context.Background()
	if _, err := Ask(ctx, dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("without agentd: %v", err)
	}
	s, err := Listen(dir, Config{
		Status: func() Status { return Status{PID: 7, Agent: Agent{Name: "a"}} },
		Check: func(_ context.Context, source string) []Check {
			return []Check{{Name: source, Result: "ok"}}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(Path(dir))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket %v, %v", st.Mode(), err)
	}
	if got, err := Ask(ctx, dir); err != nil || got.PID != 7 || got.Agent.Name != "a" {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, err := AskCheck(ctx, dir, "a b&c"); err != nil || len(got) != 1 || got[0].Name != "a b&c" {
		t.Errorf("got %+v, %v", got, err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(Path(dir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(Path(dir), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Ask(context.Background(), dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("got %v", err)
	}
	s, err := Listen(dir, Config{Status: func() Status { return Status{} }})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestLongPath(t *testing.T) {
	if _, err := Listen("/tmp/"+strings.Repeat("x", 120), Config{}); err == nil || !strings.Contains(err.Error(), "--runtime") {
		t.Errorf("got %v", err)
	}
}
