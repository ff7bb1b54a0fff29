//go:build clients

package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// labPackages are what lab.js requires, in the versions it was written for.
var labPackages = []string{"@jupyterlab/services@7.6.6", "ws@8.23.0"}

// TestJupyterLabClient runs JupyterLab's own client library, which VS Code uses as
// well.
func TestJupyterLabClient(t *testing.T) {
	s, _ := withKernels(t)
	dir := t.TempDir()
	env := append(os.Environ(), "HOME="+dir)
	install := exec.CommandContext(t.Context(), "npm", append([]string{"install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", dir}, labPackages...)...)
	install.Env = env
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("npm install: %v\n%s", err, out)
	}
	script, err := filepath.Abs("clients/lab.js")
	if err != nil {
		t.Fatal(err)
	}
	token := newToken(t, s, "ana", "analyst")
	for way, where := range map[string][]string{
		"token": {"BASE=" + s.URL + "/jupyter/host", "TOKEN=" + token}, // in a header, and in the WebSocket's URL
		"path":  {"BASE=" + s.URL + "/jupyter/host/t/" + token, "TOKEN="},
	} {
		t.Run(way, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, "node", script)
			cmd.Env = append(append(env, "NODE_PATH="+filepath.Join(dir, "node_modules")), where...)
			cmd.WaitDelay = 5 * time.Second
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.HasSuffix(string(out), "ok\n") {
				t.Errorf("%v:\n%s", err, out)
			}
		})
	}
}
