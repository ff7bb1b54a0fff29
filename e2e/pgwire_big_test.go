//go:build clients

package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
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

// TestPgxSuite runs pgx's own tests through Postern, on a source that may write. Those
// in testdata/pgx_exceptions.txt may fail, each with its reason; one that passes
// should leave the list.
func TestPgxSuite(t *testing.T) {
	e := newEndpoint(t, "pgx_test", []string{
		"create extension hstore", "create extension ltree", "create domain uint64 as numeric(20,0)",
	}, "")
	list := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/jackc/pgx/v5")
	dir, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "test", "-json", "-count=1", "-p", "1", "-timeout", "15m", "./...")
	cmd.Dir = strings.TrimSpace(string(dir))
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "PGX_TEST_DATABASE="+e.dsn("desk", ""))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	began := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	outcomes, said := map[string]string{}, map[string]*strings.Builder{}
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 4<<20)
	for lines.Scan() {
		var event struct{ Action, Package, Test, Output string }
		if json.Unmarshal(lines.Bytes(), &event) != nil {
			continue
		}
		name := strings.TrimPrefix(event.Package, "github.com/jackc/pgx/v5") + " " + event.Test
		switch event.Action {
		case "pass", "fail", "skip":
			outcomes[name] = event.Action
		case "output":
			if said[name] == nil {
				said[name] = &strings.Builder{}
			}
			said[name].WriteString(event.Output)
		}
	}
	cmd.Wait()
	allowed := exceptions(t)
	count := map[string]int{}
	for name, outcome := range outcomes {
		if strings.HasSuffix(name, " ") { // a package
			continue
		}
		count[outcome]++
		reason, excepted := allowed[name]
		switch {
		case outcome == "fail" && !excepted && !slices.ContainsFunc(keys(allowed), func(e string) bool { return strings.HasPrefix(e, name+"/") || strings.HasPrefix(name, e+"/") }):
			t.Errorf("%s failed:\n%s", name, said[name])
		case outcome == "pass" && excepted:
			t.Errorf("%s passes now: take it from the list (%s)", name, reason)
		}
	}
	for name := range allowed {
		if outcomes[name] == "" {
			t.Errorf("%s is on the list and does not exist", name)
		}
	}
	t.Logf("pgx's tests: %d pass, %d fail (all excepted), %d skip, in %s", count["pass"], count["fail"], count["skip"], time.Since(began).Round(time.Second))
	if count["pass"] < 2000 {
		t.Errorf("only %d tests passed: did the suite run?", count["pass"])
	}
}

func keys(m map[string]string) []string {
	var all []string
	for k := range m {
		all = append(all, k)
	}
	return all
}

// exceptions reads testdata/pgx_exceptions.txt: "PACKAGE TEST: reason" on each line.
func exceptions(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for line := range strings.Lines(readFile(t, "testdata/pgx_exceptions.txt")) {
		line = strings.TrimRight(line, "\n")
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, reason, ok := strings.Cut(line, ": ")
		if !ok || reason == "" {
			t.Fatal(fmt.Errorf("pgx_exceptions.txt: no reason in %q", line))
		}
		all[name] = reason
	}
	return all
}
