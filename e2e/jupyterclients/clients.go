package jupyterclients

import (
	"context"
	"embed"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

//go:embed testdata
var scripts embed.FS

// Place is an agent of a control plane and who uses it.
type Place struct {
	// Postern is the command's path.
	Postern string
	// URL is the control plane's, CAFile empty where it needs none.
	URL, Agent, Token string
}

// needed are the modules of Debian's Python.
const needed = "import ipykernel, jupyter_client, jupyter_kernel_test, nbclient, notebook, jupyter_server, jupyter_console, websocket, requests"

// env is a clean environment with a home of its own.
func (p Place) env(t *testing.T) (home string, env []string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "/usr/bin/python3", "-c", needed).CombinedOutput(); err != nil {
		t.Fatalf("Jupyter's clients are missing: run packaging/dev/deps.sh jupyter\n%s", out)
	}
	home = t.TempDir()
	return home, []string{
		"HOME=" + home, "PATH=" + os.Getenv("PATH"), "LANG=C.UTF-8", "JUPYTER_DATA_DIR=" + filepath.Join(home, "data"), "JUPYTER_CONFIG_DIR=" + filepath.Join(home, "config"),
		"JUPYTER_RUNTIME_DIR=" + filepath.Join(home, "runtime"), "IPYTHONDIR=" + filepath.Join(home, "ipython"),
		"POSTERN_URL=" + p.URL, "POSTERN_TOKEN=" + p.Token, "POSTERN=" + p.Postern, "AGENT=" + p.Agent, "BASE=" + p.URL + "/jupyter/" + p.Agent,
	}
}

// Run runs one of the scripts in testdata with Debian's Python.
func (p Place) Run(t *testing.T, script string, limit time.Duration, args ...string) string {
	t.Helper()
	home, env := p.env(t)
	text, err := scripts.ReadFile("testdata/" + script)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(home, script)
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/usr/bin/python3", append([]string{file}, args...)...)
	cmd.Env, cmd.Dir, cmd.WaitDelay = env, home, 5*time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// All runs every client.
func (p Place) All(t *testing.T) {
	t.Run("jupyter_kernel_test", func(t *testing.T) {
		out := p.Run(t, "kernel_test.py", 5*time.Minute)
		if !strings.Contains(out, "Ran 12 tests") || !strings.Contains(out, "OK") {
			t.Errorf("%s", out)
		}
	})
	for _, script := range []string{"channels.py", "nbclient_run.py", "notebook_gateway.py"} {
		t.Run(strings.TrimSuffix(script, ".py"), func(t *testing.T) {
			out := p.Run(t, script, 5*time.Minute)
			t.Log(out) // with figures
			if !strings.HasSuffix(strings.TrimSpace(out), "done") {
				t.Error("it did not come to its end")
			}
		})
	}
}
