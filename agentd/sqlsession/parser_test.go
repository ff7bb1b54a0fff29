package sqlsession_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
)

// parserClient asks the package's shared parser.
func parserClient(t *testing.T, p *sqlsession.Parser) *pgtree.Client {
	t.Helper()
	c, err := sqlsession.NewParserClient(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestParser(t *testing.T) {
	c := parserClient(t, parser)
	tree, err := c.Parse(t.Context(), "SELECT a FROM b; TABLE c")
	if err != nil || len(tree.Stmts) != 2 {
		t.Fatalf("got %v, %v", tree, err)
	}
	var syntax *pgtree.SyntaxError
	if _, err := c.Parse(t.Context(), "SELECT é FROM FROM b"); !errors.As(err, &syntax) || syntax.Position != 15 || !strings.Contains(syntax.Message, "syntax error") {
		t.Errorf("got %#v, want a syntax error at 15", err)
	}
	large := "SELECT 1" + strings.Repeat(", 'abcdefghijklmnopqrstuvwxyz'", 10_000)
	if tree, err = c.Parse(t.Context(), large); err != nil || len(tree.Stmts[0].Stmt.GetSelectStmt().TargetList) != 10_001 {
		t.Errorf("a large text: got %v", err)
	}
	var complexity *pgtree.TooComplexError
	for name, text := range map[string]string{
		"brackets":  "SELECT " + strings.Repeat("(", 5000) + "1" + strings.Repeat(")", 5000),
		"operators": "SELECT 1" + strings.Repeat("+1", 5000),
		"not":       "SELECT " + strings.Repeat("NOT ", 5000) + "true",
		"comments":  strings.Repeat("/*", 1000) + strings.Repeat("*/", 1000) + "SELECT 1",
		"size":      "SELECT '" + strings.Repeat("x", pgtree.MaxText) + "'",
		"tree":      "SELECT 1" + strings.Repeat(",'abcd'", 249_000),
	} {
		if _, err := c.Parse(t.Context(), text); !errors.As(err, &complexity) {
			t.Errorf("%s: got %v, want it to be too complex", name, err)
		}
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			c := parserClient(t, parser)
			for j := range 50 {
				tree, err := c.Parse(t.Context(), fmt.Sprintf("SELECT t%d_%d", i, j))
				if err != nil || !strings.Contains(tree.String(), fmt.Sprintf("t%d_%d", i, j)) {
					t.Errorf("got %v, %v", tree, err)
				}
			}
		})
	}
	wg.Wait()
}

// TestParserIsReplaced: whatever happens to a parser, nothing is taken for
// parsed, and the next statement has one again.
func TestParserIsReplaced(t *testing.T) {
	c := parserClient(t, parser)
	for range 2 {
		if _, err := c.Parse(t.Context(), "SELECT 1"); err != nil {
			t.Fatal(err)
		}
		pid := parser.ParserProcess(pgtree.Small)
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "another parser", func() bool { now := parser.ParserProcess(pgtree.Small); return now != 0 && now != pid })
	}
	if _, err := c.Parse(t.Context(), "SELECT 1"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Parse(ctx, "SELECT 1"); !errors.Is(err, pgtree.ErrUnavailable) {
		t.Errorf("after the end of the context: got %v", err)
	}
	gone := sqlsession.NewParser(sqlsession.ParserConfig{Executable: "/nonexistent", Logger: quietLog(t)})
	defer gone.Close()
	if _, err := parserClient(t, gone).Parse(t.Context(), "SELECT 1"); !errors.Is(err, pgtree.ErrUnavailable) {
		t.Errorf("without a parser: got %v", err)
	}
}

func TestParserIsConfined(t *testing.T) {
	c := parserClient(t, parser)
	if _, err := c.Parse(t.Context(), "SELECT 1"); err != nil {
		t.Fatal(err)
	}
	pid := parser.ParserProcess(pgtree.Small)
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	status := make(map[string]string)
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		status[name] = strings.TrimSpace(value)
	}
	want := map[string]string{"NoNewPrivs": "1", "CapBnd": "0000000000000000", "CapEff": "0000000000000000", "Seccomp": "2", "Groups": ""}
	if os.Geteuid() == 0 {
		want["Uid"] = "1900065792\t1900065792\t1900065792\t1900065792"
	}
	for name, value := range want {
		if status[name] != value {
			t.Errorf("%s: got %q, want %q", name, status[name], value)
		}
	}
	data := 1 << 30
	if raceEnabled {
		data *= 4
	}
	for _, want := range []string{"Max core file size 0 0", "Max file size 0 0", fmt.Sprintf("Max data size %d %d", data, data)} {
		if limits := limitsOf(t, pid); !strings.Contains(limits, want) {
			t.Errorf("limits: got %s, want %s", limits, want)
		}
	}
	if environ, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); len(environ) > 0 {
		t.Errorf("environment: got %q, want none", environ)
	}
	descriptors, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, d := range descriptors {
		target, _ := os.Readlink(d)
		if !strings.HasPrefix(target, "socket:") && !strings.HasPrefix(target, "pipe:") && !strings.HasPrefix(target, "anon_inode:") && target != "/dev/null" && !strings.HasPrefix(target, "/sys/fs/cgroup/") {
			t.Errorf("descriptor %s", target)
		}
	}
}
