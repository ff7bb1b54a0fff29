package main

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto/sqlsplit"
)

func TestHistory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "sql_history")
	h := loadHistory(path)
	for _, text := range []string{"select 1;", "select\n  2;", " secret;", "select 1 -- x\n;", "select 1;", "select 1;"} {
		h.add(text)
	}
	if err := h.save(); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("got %v, %v, want mode 600", info.Mode(), err)
	}
	other := loadHistory(path)
	want := []string{"select 1;", "select   2;", "select 1 -- x", ";", "select 1;"}
	if !reflect.DeepEqual(other.entries, want) {
		t.Fatalf("got %q, want %q", other.entries, want)
	}
	// Two shells at once: both are kept.
	h.add("from h;")
	other.add("from other;")
	if err := other.save(); err != nil {
		t.Fatal(err)
	}
	if err := h.save(); err != nil {
		t.Fatal(err)
	}
	if got := loadHistory(path).entries; len(got) != 7 {
		t.Errorf("got %q, want 7 entries", got)
	}
	for range 5000 {
		h.add("select '" + strings.Repeat("x", 100) + time.Now().String() + "';")
	}
	if err := h.save(); err != nil {
		t.Fatal(err)
	}
	if info, err = os.Stat(path); err != nil || info.Size() > maxHistoryBytes {
		t.Errorf("the file has %d bytes, more than %d", info.Size(), maxHistoryBytes)
	}
	if n := len(loadHistory(path).entries); n > maxHistory || n < 100 {
		t.Errorf("%d entries are kept", n)
	}
}

func TestQuoteName(t *testing.T) {
	for _, test := range []struct{ name, postgres, mysql, sqlite string }{
		{"orders", "orders", "orders", "orders"},
		{"Orders", `"Orders"`, "Orders", "Orders"},
		{"select", `"select"`, "`select`", `"select"`},
		{"Select", `"Select"`, "`Select`", `"Select"`},
		{`a"b`, `"a""b"`, "`a\"b`", `"a""b"`},
		{"a`b", "\"a`b\"", "`a``b`", "\"a`b\""},
		{"1a", `"1a"`, "`1a`", `"1a"`},
		{"a\x1b[31m", `"a\x1b[31m"`, "`a\\x1b[31m`", `"a\x1b[31m"`},
	} {
		for engine, want := range map[sqlsplit.Engine]string{sqlsplit.Postgres: test.postgres, sqlsplit.MySQL: test.mysql, sqlsplit.SQLite: test.sqlite} {
			if got := quoteName(engine, test.name); got != want {
				t.Errorf("%s: %q: got %s, want %s", engine, test.name, got, want)
			}
		}
	}
}

func TestShellOnATerminal(t *testing.T) {
	s := simulated(t)
	term := onTerminal(t, s, nil, "sql", "-i", "edge-1/warehouse")
	const prompt = "edge-1/warehouse"
	term.await(prompt + "=> ")
	term.line("rows 2\r") // a statement over two lines
	term.await(prompt + "-> ")
	term.line("-- x\r")
	term.line(";\r")
	term.await("(2 rows)")
	term.line("begin;\r")
	term.await(prompt + "*=> ")
	term.line("bad column foo;\r")
	term.await("ERROR 42703")
	term.await("               ^")
	term.await(prompt + "!=> ")
	term.line("rollback;\r")
	term.await("ROLLBACK")
	// Ctrl-C ends the statement, also one without a first row, and the session stays.
	for i, wait := range []string{"wait;\r", "wait silently;\r"} {
		term.line(wait)
		for deadline := time.Now().Add(time.Minute); !s.Running() && time.Now().Before(deadline); {
			time.Sleep(5 * time.Millisecond)
		}
		term.line("\x03")
		for deadline := time.Now().Add(time.Minute); strings.Count(term.text(), "interrupted: the statement was cancelled") != i+1; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%q: not cancelled: %q", wait, term.text())
			}
		}
	}
	if s.Sessions() != 1 || s.Hangups() != 0 {
		t.Fatalf("%d sessions and %d hang-ups, want 1 and 0", s.Sessions(), s.Hangups())
	}
	// Names and commands are completed.
	term.line("select * from ord\ts where cust\t")
	term.await("from orders where customer")
	term.line("\x15\\tim\t\r")
	term.await("timing is on")
	term.line("select 1;\r")
	term.await("Time: ")
	term.line("\\d orders\r")
	term.await("customer")
	// What ended is told, and the next statement gets a new session.
	s.EndSessions()
	term.line("select 1;\r")
	term.await("it was idle for 10m0s")
	term.line("rows 7;\r")
	term.await("(7 rows)")
	term.await("Time: ")
	// Ctrl-C forgets what is typed; twice at an empty prompt leaves.
	term.line("select 'x\r")
	term.await(prompt + "'> ")
	term.line("\x03")
	time.Sleep(twice + 100*time.Millisecond)
	term.line(" rows 9;\r")
	term.await("(9 rows)")
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if _, after, _ := strings.Cut(term.text(), "(9 rows)"); strings.Contains(after, prompt+"=> ") {
			break // it is at the prompt again, and so Ctrl-C is for that
		}
	}
	term.line("\x03")
	term.await("Ctrl-C again")
	term.line("\x03")
	code, text := term.wait()
	if code != 0 {
		t.Errorf("exit %d: %q", code, text)
	}
	if s.Sessions() != 0 {
		t.Error("the session is still open")
	}
	var home string
	for _, kv := range term.cmd.Env {
		if v, ok := strings.CutPrefix(kv, "HOME="); ok {
			home = v
		}
	}
	kept, err := os.ReadFile(filepath.Join(home, ".local", "state", "postern", "sql_history"))
	if err != nil || !strings.Contains(string(kept), "rows 2\n-- x\n;\n") || strings.Contains(string(kept), " select 1;") {
		t.Errorf("the history is %q, %v", kept, err)
	}
}

func TestShellLeaves(t *testing.T) {
	for name, key := range map[string]string{"Ctrl-D": "\x04", "quit": "\\q\r"} {
		t.Run(name, func(t *testing.T) {
			s := simulated(t)
			term := onTerminal(t, s, nil, "sql", "-i", "edge-1/warehouse")
			term.await("=> ")
			term.line(key)
			if code, text := term.wait(); code != 0 || s.Sessions() != 0 {
				t.Errorf("exit %d with %d sessions: %q", code, s.Sessions(), text)
			}
		})
	}
	t.Run("SIGTERM", func(t *testing.T) {
		s := simulated(t)
		term := onTerminal(t, s, nil, "sql", "-i", "edge-1/warehouse")
		term.await("=> ")
		if err := term.cmd.Process.Signal(os.Interrupt); err != nil { // at the prompt it means nothing
			t.Fatal(err)
		}
		if err := term.cmd.Process.Signal(terminate); err != nil {
			t.Fatal(err)
		}
		if code, text := term.wait(); code != 1 || s.Sessions() != 0 {
			t.Errorf("exit %d with %d sessions: %q", code, s.Sessions(), text)
		}
	})
}

func TestShellPager(t *testing.T) {
	s := simulated(t)
	t.Setenv("PAGER", "sed 's/^/paged /'")
	term := onTerminal(t, s, nil, "sql", "-i", "edge-1/warehouse")
	term.await("=> ")
	term.line("rows 2;\r")
	term.await("(2 rows)")
	term.line("rows 500;\r")
	term.await("paged (500 rows)")
	if strings.Contains(term.text(), "paged  1 | name 1\r\n(2") {
		t.Errorf("a short result went through the pager: %q", term.text())
	}
	term.line("\\q\r")
	if code, text := term.wait(); code != 0 {
		t.Errorf("exit %d: %q", code, text)
	}
}
