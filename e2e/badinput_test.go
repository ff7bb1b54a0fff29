package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/stack"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// badStatement is a statement that ends in an error.
type badStatement struct {
	name string
	args []string // after `postern sql`
	code int
	says []string
	// stdout is what is printed all the same.
	stdout string
	// lines of standard error; 0 means one.
	lines int
	// outcome is what the audit log of the control plane says; "" for no entry.
	outcome string
	// begun tells whether the host's log has an entry of the statement's begin.
	begun bool
}

// TestBadStatements runs what must fail on a real database: one clear line, the
// right exit code, one entry in the audit log, and nothing is changed.
func TestBadStatements(t *testing.T) {
	pg := database(t, "bad")
	if err := pg.SQLIn(t.Context(), "bad",
		"create function sneaky() returns int language sql volatile as $$ delete from items returning 1 $$",
		"create procedure nuke() language sql as $$ delete from items $$",
	); err != nil {
		t.Fatal(err)
	}
	s := newStack(t, stack.Options{})
	dsn := pg.SocketDSN("reader", "bad")
	silent, err := net.Listen("tcp", "127.0.0.1:0") // listens, and is no PostgreSQL
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	go func() {
		for {
			conn, err := silent.Accept()
			if err != nil {
				return
			}
			conn.Write([]byte("220 mail.example.com ESMTP\r\n"))
			conn.Close()
		}
	}()
	_, mailPort, _ := net.SplitHostPort(silent.Addr().String())
	open := mustSource(t, s.Dir, "openpw", dsn, "")
	if err := os.Chmod(filepath.Join(s.Dir, "openpw.pw"), 0o644); err != nil {
		t.Fatal(err)
	}
	noFile := mustSource(t, s.Dir, "nopw", dsn, "")
	if err := os.Remove(filepath.Join(s.Dir, "nopw.pw")); err != nil {
		t.Fatal(err)
	}
	wrong, err := stack.Source(s.Dir, "wrongpw", dsn, "not the password", "")
	if err != nil {
		t.Fatal(err)
	}
	config := "sources:\n" +
		mustSource(t, s.Dir, "ro", dsn, "") +
		mustSource(t, s.Dir, "rw", dsn, "      mode: read-write\n      max_rows: 5\n") +
		mustSource(t, s.Dir, "few", dsn, "      max_rows: 5\n") +
		mustSource(t, s.Dir, "small", dsn, "      max_bytes: 64KiB\n") +
		mustSource(t, s.Dir, "brief", dsn, "      statement_timeout: 1s\n") +
		mustSource(t, s.Dir, "down", "host=127.0.0.1 port=1 user=reader dbname=bad", "") +
		mustSource(t, s.Dir, "mail", "host=127.0.0.1 sslmode=disable user=reader dbname=bad port="+mailPort, "") +
		mustSource(t, s.Dir, "nodb", pg.SocketDSN("reader", "nosuch"), "") +
		wrong + open + noFile
	a, err := s.Join(t.Context(), "host", config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Join(t.Context(), "away", ""); err != nil {
		t.Fatal(err)
	}
	stop(t, s.Agents[1].Process)
	eventually(t, time.Minute, "away is offline", online(t, s, "away", false))
	denied := func(name, target, sql string, says ...string) badStatement {
		return badStatement{name: name, args: []string{target, sql}, code: 3, lines: -1, says: says, outcome: "denied", begun: true}
	}
	for _, tc := range []badStatement{
		denied("a delete", "host/ro", "delete from items", "read-only, which allows SELECT", "LINE 1: delete from items\n"),
		denied("an insert", "host/ro", "insert into items values (11, 'x')", "read-only, which allows SELECT"),
		denied("an update behind a comment", "host/ro", "/* select */ update items set name = 'x'", "read-only, which allows SELECT"),
		denied("a table", "host/ro", "create table x (i int)", "read-only, which allows SELECT"),
		denied("truncate", "host/ro", "truncate items", "read-only, which allows SELECT"),
		denied("copy", "host/ro", "copy items to program 'cat'", "COPY"),
		denied("a delete in a CTE", "host/ro", "with gone as (delete from items returning *) select * from gone", "read-only"),
		{
			name: "select into", args: []string{"host/ro", "select * into x from items"}, code: 3, lines: -1, outcome: "denied", begun: true,
			says: []string{"read-only", "LINE 1: select * into x from items\n", "                      ^\n"},
		},
		denied("a function that writes", "host/ro", "select sneaky()", "public.sneaky is the database's own"),
		denied("a lock", "host/ro", "select * from items for update", "read-only"),
		denied("a sequence", "host/ro", "select nextval('runs')", "nextval"),
		denied("a setting", "host/ro", "set transaction read write", "a transaction of its own"),
		denied("set_config", "host/ro", "select set_config('transaction_read_only', 'off', false)", "set_config"),
		denied("a procedure", "host/ro", "call nuke()", "read-only, which allows SELECT"),
		denied("a transaction", "host/rw", "commit", "a transaction of its own"),
		denied("two statements", "host/ro", "select 1; delete from items", "more than one statement"),
		denied("two statements that write", "host/rw", "delete from items; select 1", "more than one statement"),
		denied("two statements by a trick", "host/rw", "delete from items; commit", "more than one statement"),
		{
			name: "an unknown column", args: []string{"host/ro", "select id,\n  nmae from items"}, code: 1, lines: -1, outcome: "failed", begun: true,
			says: []string{"ERROR 42703: ", `column "nmae" does not exist`, "LINE 2:   nmae from items\n", "          ^\n"},
		},
		{name: "a syntax error", args: []string{"host/ro", "select from where"}, code: 1, lines: -1, says: []string{"ERROR 42601: ", "LINE 1: select from where\n", "                    ^\n"}, outcome: "failed", begun: true},
		{name: "an unknown table", args: []string{"host/ro", "select * from nosuch"}, code: 1, lines: -1, says: []string{"ERROR 42P01: ", "nosuch"}, outcome: "failed", begun: true},
		{name: "a division by zero", args: []string{"host/ro", "select 1/(id-id) from items"}, code: 1, says: []string{"ERROR 22012: division by zero"}, outcome: "failed", begun: true},
		{name: "no privilege", args: []string{"host/ro", "select * from pg_authid"}, code: 1, says: []string{"ERROR 42501: permission denied"}, outcome: "failed", begun: true},
		{name: "a row too many in a table", args: []string{"host/rw", "insert into items values (12, 'x'), (1, 'twice')"}, code: 1, lines: -1, says: []string{"ERROR 23505: "}, outcome: "failed", begun: true},
		{name: "a missing parameter", args: []string{"host/ro", "select :nosuch::int"}, code: 1, says: []string{"nosuch"}, outcome: "failed", begun: true},
		{name: "a garbled parameter", args: []string{"host/ro", "-p", "n=x", "select :n::int"}, code: 1, says: []string{"ERROR 22P02: "}, outcome: "failed", begun: true, lines: -1},
		{
			name: "too many rows", args: []string{"host/few", "-f", "csv", "select i from generate_series(1, 100000) i"}, code: 1, outcome: "failed", begun: true,
			says: []string{"the result has more than 5 rows: the first 5 were delivered"}, stdout: "i\n1\n2\n3\n4\n5\n",
		},
		{
			name: "more rows than asked for", args: []string{"host/ro", "--max-rows", "2", "-f", "csv", "select i from generate_series(1, 3) i"}, code: 1, outcome: "failed", begun: true,
			says: []string{"the result has more than 2 rows"}, stdout: "i\n1\n2\n",
		},
		{
			name: "a write with too many rows", args: []string{"host/rw", "-f", "csv", "delete from items where id > 3 returning id"}, code: 1, outcome: "failed", begun: true,
			says: []string{"the result has more than 5 rows", "rolled back"}, stdout: "id\n4\n5\n6\n7\n8\n",
		},
		{name: "a statement that takes too long", args: []string{"host/brief", "select pg_sleep(30)"}, code: 1, says: []string{"ran longer than its limit of 1s"}, outcome: "failed", begun: true},
		{name: "longer than asked for", args: []string{"host/ro", "--timeout", "500ms", "select pg_sleep(30)"}, code: 1, says: []string{"ran longer than its limit of 500ms"}, outcome: "failed", begun: true},
		{name: "a database that is down", args: []string{"host/down", "select 1"}, code: 1, says: []string{`data source "down": cannot reach PostgreSQL at 127.0.0.1:1: `, "refused"}, outcome: "failed", begun: true},
		{name: "no PostgreSQL", args: []string{"host/mail", "select 1"}, code: 1, says: []string{`data source "mail": `, mailPort}, outcome: "failed", begun: true},
		{name: "an unknown database", args: []string{"host/nodb", "select 1"}, code: 1, says: []string{`data source "nodb": `, `database "nosuch" does not exist`}, outcome: "failed", begun: true},
		{name: "a wrong password", args: []string{"host/wrongpw", "select 1"}, code: 1, says: []string{`data source "wrongpw": `, `password authentication failed for user "reader"`}, outcome: "failed", begun: true},
		{name: "a password file open to others", args: []string{"host/openpw", "select 1"}, code: 1, says: []string{`data source "openpw": `, "openpw.pw is open to others (mode 0644): run chmod 600 "}, outcome: "failed", begun: true},
		{name: "no password file", args: []string{"host/nopw", "select 1"}, code: 1, says: []string{`data source "nopw": `, "nopw.pw", "no such file"}, outcome: "failed", begun: true},
		{name: "an unknown source", args: []string{"host/nosuch", "select 1"}, code: 4, says: []string{`this agent has no data source "nosuch"`}, outcome: "failed"},
		{name: "an unknown agent", args: []string{"nosuch/ro", "select 1"}, code: 4, says: []string{`agent "nosuch" not found`}},
		{name: "an offline agent", args: []string{"away/db", "select 1"}, code: 5, says: []string{"agent away is offline"}, outcome: "failed"},
		{name: "an empty statement", args: []string{"host/ro", "  "}, code: 2, says: []string{"the query is empty"}},
		{name: "a comment", args: []string{"host/ro", "-- nothing", "-f", "csv"}, code: 1, says: []string{"the statement is empty"}, outcome: "failed", begun: true},
		{name: "an unknown format", args: []string{"host/ro", "-f", "xls", "select 1"}, code: 2, says: []string{"xls"}},
		{name: "no source", args: []string{"host", "select 1"}, code: 2, says: []string{"AGENT/SOURCE"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before, ours, theirs := items(t, "bad"), len(asked(t, s, "")), len(asked(t, s, "host"))
			e := postern(t, s, append([]string{"sql"}, tc.args...)...)
			if tc.lines == 0 {
				e.said(t, tc.code, append(tc.says, "postern: ")...)
			} else {
				if e.code != tc.code {
					t.Errorf("exit code %d, want %d", e.code, tc.code)
				}
				for _, text := range tc.says {
					if !strings.Contains(e.stderr, text) {
						t.Errorf("standard error has no %q:\n%s", text, e.stderr)
					}
				}
			}
			t.Logf("%s", e.stderr)
			if e.stdout != tc.stdout {
				t.Errorf("standard output is %q, want %q", e.stdout, tc.stdout)
			}
			if after := items(t, "bad"); after != before {
				t.Errorf("the table was %s and is %s", before, after)
			}
			var outcomes []string
			for _, entry := range asked(t, s, "")[ours:] {
				outcomes = append(outcomes, entry.Action+" "+entry.Outcome)
			}
			want := ""
			if tc.outcome != "" {
				want = "sql.run " + tc.outcome
			}
			if got := strings.Join(outcomes, ", "); got != want {
				t.Errorf("the control plane's log has %q, want %q", got, want)
			}
			outcomes = nil
			for _, entry := range asked(t, s, "host")[theirs:] {
				outcomes = append(outcomes, entry.Action+" "+entry.Outcome)
			}
			switch {
			case tc.begun:
				want = "sql.begin , " + want
			case tc.code == 4 && tc.outcome != "":
				want = "sql.run failed"
			default:
				want = ""
			}
			if got := strings.Join(outcomes, ", "); got != want {
				t.Errorf("the host's log has %q, want %q", got, want)
			}
		})
	}
	t.Run("too many bytes", func(t *testing.T) {
		e := postern(t, s, "sql", "host/small", "-f", "csv", "select i, repeat('x', 100) from generate_series(1, 100000) i")
		e.said(t, 1, "the result has more than 65536 bytes: the rows that fit were delivered")
		if rows := strings.Count(e.stdout, "\n"); rows < 100 || len(e.stdout) > 80<<10 {
			t.Errorf("%d rows in %d bytes were delivered, want about 64 KiB", rows, len(e.stdout))
		}
	})
	t.Run("a body over the limit", func(t *testing.T) {
		cmd := s.Command(t.Context(), "sql", "host/ro", "-")
		cmd.Stdin = strings.NewReader("select 1 -- " + strings.Repeat("x", 1<<20))
		finish(t, cmd).said(t, 2, "the query has more than 1 MiB")
		// Whoever speaks to the control plane without our command is told as well.
		before := len(asked(t, s, ""))
		big := strings.Repeat("x", proto.MaxSQLRequest)
		_, err := api(t, s).SQL(t.Context(), "host", "ro", &posternv1.RunSQLRequest{Sql: "select :v", Parameters: []*posternv1.Parameter{{Name: "v", Value: &big}}})
		if proto.CodeOf(err) != proto.CodeBodyTooLarge {
			t.Errorf("got %v", err)
		}
		if after := len(asked(t, s, "")); after != before {
			t.Errorf("%d entries in the log", after-before)
		}
	})
	t.Run("who may not", func(t *testing.T) {
		for role, code := range map[string]int{"viewer": 3, "analyst": 0, "operator": 0} {
			cmd := s.Command(t.Context(), "sql", "host/ro", "select 1")
			cmd.Env = append(cmd.Env, "POSTERN_TOKEN="+must(t, s, "token", "create", role, "--role", role))
			if e := finish(t, cmd); e.code != code {
				t.Errorf("%s: exit code %d, want %d: %s", role, e.code, code, e.stderr)
			} else if code != 0 {
				e.said(t, code, "viewer")
			}
		}
		cmd := s.Command(t.Context(), "sql", "host/ro", "select 1")
		cmd.Env = append(cmd.Env, "POSTERN_TOKEN="+must(t, s, "token", "create", "short", "--role", "analyst"))
		must(t, s, "token", "revoke", "short")
		finish(t, cmd).said(t, 3, "postern: ")
	})
	// A password that is put right works with no restart.
	if err := os.Chmod(filepath.Join(s.Dir, "openpw.pw"), 0o600); err != nil {
		t.Fatal(err)
	}
	answers(t, s, "host/openpw", "-- a comment\nselect 1", "1")
	auditVerifies(t, s)

	t.Run("a reload of a bad file", func(t *testing.T) {
		a.Config = config + "    colour: blue\n"
		line := strings.Count("url: x\n"+a.Config, "\n")
		if err := a.WriteConfig(); err != nil {
			t.Fatal(err)
		}
		a.Process.Signal(syscall.SIGHUP)
		want := fmt.Sprintf("%s:%d: unknown key sources.colour", a.ConfigFile(), line)
		eventually(t, time.Minute, "agentd says what is wrong", func() error {
			if !strings.Contains(a.Process.Log(), want) {
				return fmt.Errorf("its log has no %q", want)
			}
			return nil
		})
		answers(t, s, "host/ro", "select 1", "1")
	})
	t.Run("a control plane that is down", func(t *testing.T) {
		stop(t, s.ControlPlane)
		postern(t, s, "sql", "host/ro", "select 1").said(t, 1, "postern: reach the control plane at "+s.URL, "refused", "check the URL, and that the control plane runs")
	})
}

// TestBadConfiguration starts agentd with every wrong file: one line with file and
// line number, exit code 1, and nothing is begun.
func TestBadConfiguration(t *testing.T) {
	s := newStack(t, stack.Options{})
	a := hostNamed(t, s, "host")
	if err := register(t, s, "host", must(t, s, "key", "create")).err(); err != nil {
		t.Fatal(err)
	}
	const source = "sources:\n  - name: db\n    engine: postgres\n    dsn: host=/run/postgresql dbname=d user=u\n"
	before := fmt.Sprint(files(t, a.Dir()))
	entries := len(localEntries(t, a))
	for _, tc := range []struct{ name, config, says string }{
		{"unknown key", "sorces: []\n", ":2: unknown key sorces: did you mean sources?"},
		{"unknown key in a policy", source + "    policy:\n      max_row: 5\n", ":7: unknown key sources.policy.max_row: did you mean max_rows?"},
		{"wrong engine", strings.Replace(source, "postgres\n", "oracle\n", 1), ":4: source db: engine \"oracle\" is "},
		{"a password in the dsn", strings.Replace(source, "user=u", "user=u password=hunter2", 1), ":5: source db: dsn: it holds a password"},
		{"a relative password file", source + "    password: {file: db.pw}\n", ":6: source db: password: file \"db.pw\" is not an absolute path"},
		{"a mask", source + "    policy:\n      mask: [{columns: [x], with: hash}]\n", ":7: "},
		{"metrics on the network", "metrics: {listen: '0.0.0.0:9469'}\n", ":2: metrics.listen: \"0.0.0.0:9469\" is not a loopback address"},
		{"no YAML", "sources: [\n", "agentd.yaml:"},
		{"a wrong unit", source + "    policy:\n      max_bytes: 5 parsecs\n", ":7: "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a.Config = tc.config
			if err := a.WriteConfig(); err != nil {
				t.Fatal(err)
			}
			e := finish(t, a.Command(t.Context(), "run", "--config", a.ConfigFile(), "--state", a.StateDir(), "--runtime", a.RuntimeDir()))
			e.said(t, 1, "agentd: "+a.ConfigFile(), tc.says)
			t.Logf("%s", e.stderr)
			if strings.Contains(e.stderr, "hunter2") {
				t.Error("it shows the password")
			}
			if after := fmt.Sprint(files(t, a.Dir())); after != before {
				t.Errorf("the files were %s and are %s", before, after)
			}
			if n := len(localEntries(t, a)); n != entries {
				t.Errorf("%d entries were added to the log", n-entries)
			}
		})
	}
	a.Config = ""
	if err := a.WriteConfig(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	run := func(args ...string) ended { return finish(t, a.Command(ctx, append([]string{"run"}, args...)...)) }
	run("--config", "/nonexistent/agentd.yaml", "--state", a.StateDir()).said(t, 1, "configuration /nonexistent/agentd.yaml does not exist")
	run("--config", a.ConfigFile(), "--state", filepath.Join(s.Dir, "empty")).said(t, 1, "this host is not registered", "run agentd register")
	run("--no-such-flag").said(t, 2, "no-such-flag")
	key := filepath.Join(a.StateDir(), "identity", "key.pem")
	if err := os.Chmod(key, 0o644); err != nil {
		t.Fatal(err)
	}
	run("--config", a.ConfigFile(), "--state", a.StateDir()).said(t, 1, key, "chmod")
	if err := os.Chmod(key, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	if err := a.Online(ctx); err != nil {
		t.Fatal(err)
	}
	// A second one of the same state directory.
	// It had begun to log by then.
	if e := run("--config", a.ConfigFile(), "--state", a.StateDir(), "--runtime", a.RuntimeDir()); e.code != 1 || !strings.Contains(e.stderr, "agentd: another agentd uses the state directory") {
		t.Errorf("exit code %d: %s", e.code, e.stderr)
	}
	if e := finish(t, a.Command(ctx, "status", "--state", a.StateDir(), "--runtime", a.RuntimeDir())); e.code != 0 {
		t.Errorf("the first one's status: exit code %d: %s", e.code, e.stderr)
	}
	if err := online(t, s, "host", true)(); err != nil {
		t.Error(err)
	}
}
