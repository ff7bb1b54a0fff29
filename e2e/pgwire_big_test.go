//go:build clients

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// These tests want programs that are large to install: `make clients` runs them.

// nodePackages are what client.js requires, in the versions it was written for.
var nodePackages = []string{"pg@8.23.1", "pg-cursor@2.22.0"}

func TestBigClients(t *testing.T) {
	e := newEndpoint(t, "bigclients", shop, "      concurrency: 32\n      functions: [public.twice]\n")
	t.Run("JDBC", func(t *testing.T) {
		out := mustClient(t, e.env("shop"), "", "java", "-cp", "/usr/share/java/postgresql.jar", "clients/Client.java")
		if !strings.HasSuffix(out, "ok\n") {
			t.Errorf("got %s", out)
		}
	})
	t.Run("node-postgres", func(t *testing.T) {
		dir := t.TempDir()
		env := append(os.Environ(), "HOME="+dir)
		install := exec.CommandContext(t.Context(), "npm", append([]string{"install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", dir}, nodePackages...)...)
		install.Env = env
		if out, err := install.CombinedOutput(); err != nil {
			t.Fatalf("npm install: %v\n%s", err, out)
		}
		script, err := filepath.Abs("clients/client.js")
		if err != nil {
			t.Fatal(err)
		}
		out := mustClient(t, append(e.env("shop"), "NODE_PATH="+filepath.Join(dir, "node_modules")), "", "node", script)
		if !strings.HasSuffix(out, "ok\n") {
			t.Errorf("got %s", out)
		}
	})
}
