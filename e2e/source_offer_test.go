package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/postern-dev/postern/e2e/stack"
)

// TestCheckBeforeSaving checks a source that the host's configuration does not
// have: on the host, and with a one-time token from the control plane.
func TestCheckBeforeSaving(t *testing.T) {
	pg := postgres(t)
	s := newStack(t, stack.Options{})
	a, err := s.Join(t.Context(), "a", "")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "new.yaml")
	if err := os.WriteFile(file, []byte("sources:\n"+mustSource(t, dir, "new", pg.DSN("reader", "postgres"), "")+
		mustSource(t, dir, "closed", "host=127.0.0.1 port=1 dbname=x user=y", "")), 0o600); err != nil {
		t.Fatal(err)
	}
	agentd := func(args ...string) ended {
		return finish(t, a.Command(t.Context(), append([]string{"source", "check", "--runtime", a.RuntimeDir()}, args...)...))
	}
	if got := agentd("--file", file, "new"); got.code != 0 || !strings.Contains(got.stdout, "credentials") || strings.Contains(got.stdout, "pct1_") {
		t.Errorf("got %+v", got)
	}
	if got := agentd("--file", file, "closed"); got.code != 1 || !strings.Contains(got.stdout, "cannot reach PostgreSQL") {
		t.Errorf("got %+v", got)
	}
	agentd("--file", file).said(t, 1, "declares 2 data sources: say which")
	agentd("--file", file, "other").said(t, 1, `declares no data source "other"`)
	agentd("new").said(t, 2, "--file FILE")
	bad := filepath.Join(dir, "bad.yaml")
	if err := os.WriteFile(bad, []byte("sources:\n  - name: x\n    engine: postgres\n    dsn: host=h user=u password=marked\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := agentd("--file", bad); got.code != 1 || !strings.Contains(got.stderr, "bad.yaml:4") || strings.Contains(got.stderr, "marked") {
		t.Errorf("got %+v", got)
	}

	var offered struct{ Token string }
	got := agentd("--file", file, "--offer", "-o", "json", "new")
	if err := json.Unmarshal([]byte(got.stdout), &offered); err != nil || !strings.HasPrefix(offered.Token, "pct1_") {
		t.Fatalf("got %+v, %v", got, err)
	}
	token := filepath.Join(dir, "token")
	if err := os.WriteFile(token, []byte(offered.Token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	postern(t, s, "source", "check", "a/closed", "--one-time-token-file", token).said(t, 3, "is not offered with this one-time token")
	if got := postern(t, s, "source", "check", "a/new", "--one-time-token-file", token); got.code != 0 || !strings.Contains(got.stdout, "credentials") {
		t.Errorf("got %+v", got)
	}
	postern(t, s, "source", "check", "a/new", "--one-time-token-file", token).said(t, 3, "it was used")
	postern(t, s, "source", "check", "a/new").said(t, 4, `no data source "new"`)
	if got := must(t, s, "source", "list"); strings.Contains(got, "a/new") {
		t.Errorf("it was saved: %s", got)
	}
	if strings.Contains(a.Process.Log(), offered.Token) {
		t.Error("the log has the token")
	}
	auditVerifies(t, s)
}
