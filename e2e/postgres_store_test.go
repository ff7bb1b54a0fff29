package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/e2e/stack"
)

// TestControlPlaneOnPostgreSQL keeps a control plane's metadata in PostgreSQL: what
// works on SQLite works there, its password is changed while it runs, and the
// server may restart under it.
func TestControlPlaneOnPostgreSQL(t *testing.T) {
	ctx := t.Context()
	pg := pgserver.Start(t)
	if err := errors.Join(pg.CreateRole(ctx, "postern", "first"), pg.CreateDatabase(ctx, "postern", "postern"), pg.CreateRole(ctx, "reader", readerPassword)); err != nil {
		t.Fatal(err)
	}
	passwords := t.TempDir()
	file := filepath.Join(passwords, "pw")
	write := func(password string) {
		t.Helper()
		next := file + ".next"
		if err := errors.Join(os.WriteFile(next, []byte(password+"\n"), 0o600), os.Rename(next, file)); err != nil {
			t.Fatal(err)
		}
	}
	write("first")
	s := newStack(t, stack.Options{Args: []string{
		"--database", fmt.Sprintf("postgres://postern@127.0.0.1:%d/postern?sslmode=disable", pg.Port), "--database-password-file", file,
	}})
	if _, err := os.Stat(filepath.Join(s.DataDir(), "controlplane.db")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("there is a SQLite database as well: %v", err)
	}
	if _, err := s.Join(ctx, "host", "sources:\n"+mustSource(t, s.Dir, "db", pg.SocketDSN("reader", "postgres"), "")); err != nil {
		t.Fatal(err)
	}
	answers(t, s, "host/db", "select count(*) from generate_series(1, 1000)", "1000")
	must(t, s, "token", "create", "someone", "--role", "viewer")

	// The password changes, first in the database, a moment later in the file;
	// meanwhile all connections are cut, so that it is needed.
	if err := pg.SQL(ctx, "ALTER ROLE postern PASSWORD 'second'", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postern'"); err != nil {
		t.Fatal(err)
	}
	write("second")
	serves := func(what string) {
		t.Helper()
		eventually(t, time.Minute, what, func() error {
			if e := postern(t, s, "sql", "host/db", "-f", "csv", "select 1"); e.code != 0 {
				return errors.New(e.stderr)
			}
			if e := postern(t, s, "key", "create"); e.code != 0 {
				return errors.New(e.stderr)
			}
			return nil
		})
	}
	serves("it works with the new password")
	if err := pg.SQL(ctx, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postern'"); err != nil {
		t.Fatal(err)
	}
	serves("it works after its connections were cut")

	// The server is gone for a moment: one clear line, and then it goes on.
	if err := pg.Down(); err != nil {
		t.Fatal(err)
	}
	postern(t, s, "key", "create").said(t, 1, "the control plane's database does not answer")
	if err := pg.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	serves("it works after the database's restart")
	if err := online(t, s, "host", true)(); err != nil {
		t.Error(err)
	}
	auditVerifies(t, s)
	pid := s.ControlPlane.PID()
	if !s.ControlPlane.Running() || s.ControlPlane.PID() != pid {
		t.Error("the control plane was restarted")
	}

	// A kill and a start: the same installation.
	before := must(t, s, "agent", "list", "-o", "json")
	s.ControlPlane.Kill()
	startControlPlane(t, s)
	eventually(t, time.Minute, "agentd is back", online(t, s, "host", true))
	serves("it works after a kill")
	if after := must(t, s, "agent", "list", "-o", "json"); strings.Count(after, `"id"`) != strings.Count(before, `"id"`) {
		t.Errorf("the agents were %s and are %s", before, after)
	}
	auditVerifies(t, s)
	if log := s.ControlPlane.Log(); strings.Contains(log, "first\"") || strings.Contains(log, "password=") {
		t.Error("the log shows a password")
	}
}

// TestMissingPrivileges starts a control plane with each privilege missing in its
// turn: it ends with one line that names it and the statement that mends it, and
// that statement does mend it.
func TestMissingPrivileges(t *testing.T) {
	ctx := t.Context()
	pg := pgserver.Start(t)
	data, file := filepath.Join(t.TempDir(), "data"), filepath.Join(t.TempDir(), "pw")
	if err := errors.Join(os.WriteFile(file, []byte("pw\n"), 0o600), pg.CreateRole(ctx, "cp", "pw")); err != nil {
		t.Fatal(err)
	}
	serve := func(database string) *exec.Cmd {
		return exec.CommandContext(ctx, filepath.Join(binaries(t), "controlplane"), "serve", "--data", data, "--listen", "127.0.0.1:0",
			"--database", fmt.Sprintf("postgres://cp@127.0.0.1:%d/%s?sslmode=disable", pg.Port, database), "--database-password-file", file)
	}
	refused := func(database string, code int, says ...string) {
		t.Helper()
		e := finish(t, serve(database))
		e.said(t, code, append(says, "controlplane: ")...)
		t.Logf("%s", e.stderr)
	}
	// mend takes the statement out of the line and runs it as the superuser.
	mend := func(database string) {
		t.Helper()
		e := finish(t, serve(database))
		_, statement, ok := strings.Cut(strings.TrimSpace(e.stderr), ": run ")
		if !ok {
			t.Fatalf("no statement in %q", e.stderr)
		}
		statement, _, _ = strings.Cut(statement, " as the tables' owner")
		if err := pg.SQLIn(ctx, database, statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	refused("none", 1, `database "none"`, "it does not exist: run CREATE DATABASE")
	if err := pg.CreateDatabase(ctx, "cpdb", ""); err != nil {
		t.Fatal(err)
	}
	if err := pg.SQL(ctx, "REVOKE CONNECT ON DATABASE cpdb FROM PUBLIC"); err != nil {
		t.Fatal(err)
	}
	refused("cpdb", 1, `role "cp" lacks CONNECT on it: run GRANT CONNECT ON DATABASE "cpdb" TO "cp"`)
	mend("cpdb")
	refused("cpdb", 1, `role "cp" lacks CREATE on schema "public", needed to make the tables: run GRANT CREATE ON SCHEMA "public" TO "cp"`)
	mend("cpdb")
	serves(t, serve("cpdb"))
	// Tables that are there, but another role's.
	if err := pg.SQLIn(ctx, "cpdb", "REASSIGN OWNED BY cp TO postgres", "REVOKE CREATE ON SCHEMA public FROM cp"); err != nil {
		t.Fatal(err)
	}
	refused("cpdb", 1, `role "cp" lacks SELECT on postern_schema: run GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA`)
	mend("cpdb")
	serves(t, serve("cpdb"))
	if err := pg.SQLIn(ctx, "cpdb", "REVOKE ALL ON ALL TABLES IN SCHEMA public FROM cp", "GRANT SELECT ON postern_schema TO cp"); err != nil {
		t.Fatal(err)
	}
	refused("cpdb", 1, `role "cp" lacks `, " and ", " more: run GRANT ")
	mend("cpdb")
	if err := pg.SQLIn(ctx, "cpdb", "REVOKE INSERT ON audit FROM cp"); err != nil {
		t.Fatal(err)
	}
	refused("cpdb", 1, `role "cp" lacks INSERT on audit: run GRANT `)
	mend("cpdb")
	serves(t, serve("cpdb"))

	if err := os.WriteFile(file, []byte("wrong\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused("cpdb", 1, `PostgreSQL refuses the password of role "cp" in `+file)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	refused("cpdb", 1, "the database's password: open "+file)
	if err := pg.Down(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("pw\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused("cpdb", 1, "connect", "refused")
}

// serves starts a control plane, waits until it says that it serves, and ends it.
func serves(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	log := filepath.Join(t.TempDir(), "log")
	f, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Signal(os.Interrupt) //nolint:errcheck // the exit code says it
		if err := cmd.Wait(); err != nil && context.Cause(t.Context()) == nil {
			t.Errorf("control plane: %v", err)
		}
	}()
	eventually(t, 30*time.Second, "it serves", func() error {
		text, err := os.ReadFile(log)
		if err == nil && !strings.Contains(string(text), "control plane serving") {
			err = fmt.Errorf("%s", text)
		}
		return err
	})
}
