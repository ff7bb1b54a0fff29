//go:build clients

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// duckPackages are what duck.js requires, in the versions it was written for. DuckDB comes in
// them as it is, built by its makers.
var duckPackages = []string{"@duckdb/node-api@1.5.6-r.1"}

// TestDuckDB lets DuckDB write and read Parquet, CSV and a database of its own on a mounted workspace, reads
// at the control plane what it wrote, and lets it read what came from there, with nothing of it on the host.
func TestDuckDB(t *testing.T) {
	s, a, target := mounted(t)
	dir := t.TempDir()
	env := append(os.Environ(), "HOME="+dir)
	install := exec.CommandContext(t.Context(), "npm", append([]string{"install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", dir}, duckPackages...)...)
	install.Env = env
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("npm install: %v\n%s", err, out)
	}
	script, err := filepath.Abs("clients/duck.js")
	if err != nil {
		t.Fatal(err)
	}
	duck := func(what, where string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "node", script, what, where)
		cmd.Env = append(env, "NODE_PATH="+filepath.Join(dir, "node_modules"))
		cmd.WaitDelay = 5 * time.Second
		if out, err := cmd.CombinedOutput(); err != nil || !strings.HasSuffix(string(out), "ok\n") {
			t.Fatalf("%s %s: %v:\n%s", what, where, err, out)
		}
	}
	duck("write", filepath.Join(target, "duck"))
	// mountd dies, and what DuckDB wrote is read from its successor.
	status, err := attachStatus(t, a)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(status.Attachments.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	duck("read", filepath.Join(target, "duck"))
	eventually(t, 2*time.Minute, "the upload", func() error {
		status, err := attachStatus(t, a)
		if err != nil {
			return err
		}
		for _, w := range status.Attachments.Workspaces {
			if w.UnsentChanges > 0 {
				return fmt.Errorf("%d changes are unsent", w.UnsentChanges)
			}
		}
		if len(status.Attachments.Workspaces) == 0 {
			return errors.New("nothing is mounted")
		}
		return nil
	})
	local := filepath.Join(dir, "back")
	must(t, s, "file", "get", "-r", "lab:/duck", local)
	duck("read", local)
	must(t, s, "file", "put", "-r", local, "lab:/")
	back := filepath.Join(target, "back")
	eventually(t, 30*time.Second, "what was put", func() error {
		return exec.CommandContext(t.Context(), "test", "-s", filepath.Join(back, "own.duckdb")).Run()
	})
	duck("read", back)
}
