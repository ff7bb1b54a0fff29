package main

import (
	"os"
	"path/filepath"
	"reflect"
	"sort"
	"strings"
	"testing"
	"time"
)

func TestSplitter(t *testing.T) {
	tests := []struct {
		name, text string
		want       []string
		pending    string
		mark       string
	}{
		{"plain", "select 1; select 2;", []string{"select 1", "select 2"}, "", "="},
		{"lines", "select\n1\n;", []string{"select\n1"}, "", "="},
		{"open", "select 1", nil, "select 1", "-"},
		{"quotes", `select ';', ";", 'it''s;';`, []string{`select ';', ";", 'it''s;'`}, "", "="},
		{"escapes", `select E'\';', e'\\';x;`, []string{`select E'\';', e'\\'`, "x"}, "", "="},
		{"no escapes", `select '\';x;`, []string{`select '\'`, "x"}, "", "="},
		{"name before a quote", `select one'\';`, []string{`select one'\'`}, "", "="},
		{"dollar", "do $$ a; $x$ b; $$; select $x$ $$; $x$;", []string{"do $$ a; $x$ b; $$", "select $x$ $$; $x$"}, "", "="},
		{"dollar in a name", "select a$$;b$$;", []string{"select a$$", "b$$"}, "", "="},
		{"native", "execute $1;", []string{"execute $1"}, "", "="},
		{"comments", "select 1 -- x;\n, /* ; /* ; */ ; */ 2;", []string{"select 1 -- x;\n, /* ; /* ; */ ; */ 2"}, "", "="},
		{"comment alone", "-- x\n/* y */ ;", nil, "", "="},
		{"parentheses", "create rule r as on insert to t do (select 1; select 2);", []string{"create rule r as on insert to t do (select 1; select 2)"}, "", "="},
		{"atomic", "create or replace function f() returns int begin atomic select 1; select case when true then 1 end; end; select 1;", []string{"create or replace function f() returns int begin atomic select 1; select case when true then 1 end; end", "select 1"}, "", "="},
		{"begin", "begin; select 1; end;", []string{"begin", "select 1", "end"}, "", "="},
		{"in quotes", "select 'x", nil, "select 'x", "'"},
		{"in a dollar quote", "select $a$x", nil, "select $a$x", "$"},
		{"in a comment", "select /*", nil, "select /*", "*"},
		{"in parentheses", "select (1", nil, "select (1", "("},
		{"unicode", "select 'é;😀' ü;", []string{"select 'é;😀' ü"}, "", "="},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := &splitter{}
			var got []string
			for line := range strings.SplitAfterSeq(test.text, "\n") {
				got = append(got, s.feed(line)...)
			}
			if !reflect.DeepEqual(got, test.want) || s.pending() != test.pending || s.mark() != test.mark {
				t.Errorf("got %q, pending %q, mark %s; want %q, %q, %s", got, s.pending(), s.mark(), test.want, test.pending, test.mark)
			}
		})
	}
}

func FuzzSplitter(f *testing.F) {
	for _, text := range []string{"select ';'; x", "E'\\';' $a$;$a$ /* ; */ -- ;\n;", "create function f begin atomic a; end;", "{{a}} :b ::c"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		// However the text is cut into lines, nothing is lost and nothing made up.
		s := &splitter{}
		var got []string
		for line := range strings.SplitAfterSeq(text, "\n") {
			got = append(got, s.feed(line)...)
		}
		all := strings.Join(append(got, s.pending()), "")
		for _, r := range []string{" ", "\n", "\t", "\r", "\f", "\v", ";"} {
			all = strings.ReplaceAll(all, r, "")
		}
		if len(all) > len(text) {
			t.Fatalf("%q became %q", text, got)
		}
		placeholders(text)
	})
}

func TestPlaceholders(t *testing.T) {
	for text, want := range map[string]string{
		"select :a, {{b}}, {{ c | list }}, x::int, ':no', \"{{no}}\" -- :no\n, /* :no */ $$ :no $$, E'\\':no', :d::text": "a b c d",
		"a[1:n] := {{1}} {{}} {{": "n",
		"":                        "",
		":é":                      "",
	} {
		var got []string
		for name := range placeholders(text) {
			got = append(got, name)
		}
		sort.Strings(got)
		if strings.Join(got, " ") != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

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
	for name, want := range map[string]string{"orders": "orders", "Orders": `"Orders"`, "select": `"select"`, `a"b`: `"a""b"`, "1a": `"1a"`, "a\x1b[31m": `"a\x1b[31m"`} {
		if got := quoteName(name); got != want {
			t.Errorf("%q: got %s, want %s", name, got, want)
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
		for deadline := time.Now().Add(10 * time.Second); !s.Running() && time.Now().Before(deadline); {
			time.Sleep(5 * time.Millisecond)
		}
		term.line("\x03")
		for deadline := time.Now().Add(20 * time.Second); strings.Count(term.text(), "interrupted: the statement was cancelled") != i+1; time.Sleep(5 * time.Millisecond) {
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
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
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
