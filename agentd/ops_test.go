package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/audit"
	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/agentd/doctor"
	"github.com/postern-dev/postern/proto/auditchain"
)

// unpack is what an archive has, by name.
func unpack(t *testing.T, path string) map[string]string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name] = string(text)
	}
}

// TestBundle makes one of a host whose configuration, state and log are full of secrets, while agentd runs.
func TestBundle(t *testing.T) {
	l := newLab(t, newTestControl(t), "")
	write := func(name, text string) string {
		t.Helper()
		path := l.path(name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	password := write("pw", "canary-password-file\n")
	mask := write("mask", strings.Repeat("canary-mask-key-", 2)+"\n")
	l.configure(fmt.Sprintf(`proxy: http://puser:canary-proxy@192.0.2.9:3128
no_proxy: 127.0.0.1
mask_key: {file: %s}
sources:
  - name: shop
    engine: postgres
    dsn: host=db.inside.example user=reader
    password: {file: %s}
    policy: {mode: read-only, mask: [{pattern: 'canary-pattern', with: redact}]} # canary-comment
`, mask, password))
	l.start()
	r := &doctor.Report{}
	r.Add("source shop", doctor.Failed, "cannot connect: canary-password-file was refused by db.inside.example; password=canary-other", "mend it")
	path := l.path("bundle.tar.gz")
	if err := writeBundle(t.Context(), path, r, &l.d.places); err != nil {
		t.Fatal(err)
	}
	files := unpack(t, path)
	for _, name := range []string{"README.txt", "doctor.json", "status.json", "host.json", "state.json", "audit.json", "journal.txt", "agentd.yaml"} {
		if files["postern-support/"+name] == "" {
			t.Errorf("%s is missing or empty", name)
		}
	}
	key, err := os.ReadFile(filepath.Join(l.d.state, "identity", "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if strings.Contains(text, "canary") {
			t.Errorf("%s has a secret:\n%s", name, text)
		}
		if strings.Contains(text, string(bytes.TrimSpace(key))) || strings.Contains(text, "PRIVATE KEY") {
			t.Errorf("%s has the host's key", name)
		}
	}
	var checks []doctor.Check
	if err := json.Unmarshal([]byte(files["postern-support/doctor.json"]), &checks); err != nil || len(checks) != 1 || checks[0].Remedy != "mend it" {
		t.Errorf("doctor.json: %v, %v", checks, err)
	}
	var status control.Status
	if err := json.Unmarshal([]byte(files["postern-support/status.json"]), &status); err != nil || status.PID != os.Getpid() {
		t.Errorf("status.json: %+v, %v", status, err)
	}
	for file, want := range map[string]string{
		"agentd.yaml": "mode: read-only", "state.json": "identity/key.pem", "audit.json": `"whole": true`, "host.json": `"kernel"`,
	} {
		if !strings.Contains(files["postern-support/"+file], want) {
			t.Errorf("%s has no %q:\n%s", file, want, files["postern-support/"+file])
		}
	}
	if strings.Contains(files["postern-support/agentd.yaml"], "db.inside") {
		t.Error("agentd.yaml has a connection string")
	}
	if err := writeBundle(t.Context(), path, r, &l.d.places); err == nil || !strings.Contains(err.Error(), "there already") {
		t.Errorf("over another: got %v", err)
	}
}

func TestLogLevel(t *testing.T) {
	l := newLab(t, newTestControl(t), "")
	l.configure("log: {level: warn}\n")
	l.start()
	ask := func(level string) string {
		t.Helper()
		got, err := control.AskLevel(t.Context(), l.d.runtimeDir(), level)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := ask(""); got != "warn" {
		t.Errorf("at first: %q", got)
	}
	if got := ask("debug"); got != "debug" || l.d.level.Level() != slog.LevelDebug {
		t.Errorf("debug: %q, %v", got, l.d.level.Level())
	}
	if _, err := control.AskLevel(t.Context(), l.d.runtimeDir(), "loud"); err == nil || !strings.Contains(err.Error(), "none of") {
		t.Errorf("no level: got %v", err)
	}
	if err := l.d.Reload(); err != nil || ask("") != "warn" {
		t.Errorf("after a reload: %q, %v", ask(""), err)
	}
	var names []string
	for _, c := range newRoot().Commands() {
		names = append(names, c.Name())
	}
	if !slices.Contains(names, "log-level") {
		t.Errorf("the command is not there: %v", names)
	}
	l.stop()
	if _, err := control.AskLevel(t.Context(), l.path("run"), ""); !errors.Is(err, control.ErrNotRunning) {
		t.Errorf("not running: got %v", err)
	}
}

// TestHostKeepsThePeersHead: each head of the control plane's chain once, also over restarts, and what does not fit
// is an entry and a warning.
func TestHostKeepsThePeersHead(t *testing.T) {
	c := newTestControl(t)
	l := newLab(t, c, "")
	kept := func() (heads []uint64, failed int) {
		t.Helper()
		err := audit.List(l.path("state"), 1, func(_ []byte, e auditchain.Entry) error {
			if h, ok := auditchain.PeerHead(e); ok {
				heads = append(heads, h.Sequence)
				if e.Outcome == "failed" {
					failed++
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return heads, failed
	}
	for _, step := range []struct {
		name    string
		head    auditchain.Head
		warning string
		want    []uint64
		failed  int
	}{
		{"a version before", auditchain.Head{}, "", nil, 0},
		{"first", auditchain.Head{Sequence: 5, Hash: [32]byte{5}}, "", []uint64{5}, 0},
		{"the same again", auditchain.Head{Sequence: 5, Hash: [32]byte{5}}, "", []uint64{5}, 0},
		{"longer", auditchain.Head{Sequence: 9, Hash: [32]byte{9}}, "", []uint64{5, 9}, 0},
		{"rewritten", auditchain.Head{Sequence: 9, Hash: [32]byte{1}}, "rewritten", []uint64{5, 9, 9}, 1},
		{"cut", auditchain.Head{Sequence: 3, Hash: [32]byte{3}}, "had reached 9", []uint64{5, 9, 9, 3}, 2},
	} {
		c.mu.Lock()
		c.own = step.head
		n := len(c.hellos)
		c.mu.Unlock()
		l.start()
		c.awaitHello(n + 1)
		poll(t, "the link", func() bool { return l.d.link.State().Up })
		if got := l.d.status().Audit.Warning; (got == "") != (step.warning == "") || !strings.Contains(got, step.warning) {
			t.Errorf("%s: warning %q", step.name, got)
		}
		l.stop()
		if heads, failed := kept(); !slices.Equal(heads, step.want) || failed != step.failed {
			t.Errorf("%s: the log has %v, %d failed, want %v and %d", step.name, heads, failed, step.want, step.failed)
		}
	}
}
