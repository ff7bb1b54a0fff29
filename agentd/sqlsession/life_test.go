package sqlsession_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestRotatedPassword(t *testing.T) {
	createRole(t, "rotated", "one")
	var current atomic.Value
	current.Store("wrong")
	s := source("db")
	s.DSN = server.DSN("rotated", pgserver.Superuser)
	s.Password = func(context.Context) (string, error) {
		if p := current.Load().(string); p != "" {
			return p, nil
		}
		return "", errors.New("secret file /etc/x.pw is empty")
	}
	m := newManager(t, sqlsession.Config{Warm: -1}, s)
	anybody := func() sqlsession.Request {
		r := request("SELECT 1")
		r.Owner = ""
		return r
	}
	if e := refuse(t, m, anybody(), proto.CodeSourceCredentials); !strings.Contains(e.Error(), "28P01") {
		t.Errorf("got %v, want 28P01 in it", e)
	}
	current.Store("one")
	query(t, m, anybody())
	if err := server.SQL(t.Context(), "ALTER ROLE rotated PASSWORD 'two'"); err != nil {
		t.Fatal(err)
	}
	refuse(t, m, anybody(), proto.CodeSourceCredentials)
	current.Store("two")
	query(t, m, anybody())
	current.Store("")
	if e := refuse(t, m, anybody(), proto.CodeSourceConfig); !strings.Contains(e.Error(), "/etc/x.pw is empty") {
		t.Errorf("got %v, want the password function's error", e)
	}
}

func TestBadSources(t *testing.T) {
	// Something that listens and is no PostgreSQL.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "J\x00\x00\x00\x0a5.7.0-mysql\x00 is what I am\r\n")
			_ = c.Close()
		}
	}()
	defer l.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	port := func(l net.Listener) string {
		_, p, _ := net.SplitHostPort(l.Addr().String())
		return p
	}
	tests := []struct {
		name, engine, dsn string
		code              proto.Code
		says              string
	}{
		{"refused", "postgres", "host=127.0.0.1 user=x port=" + port(closed), proto.CodeSourceUnreachable, "127.0.0.1:" + port(closed)},
		{"no such host", "postgres", "host=nowhere.invalid user=x", proto.CodeSourceUnreachable, "nowhere.invalid"},
		{"no socket", "postgres", "host=/nonexistent user=x", proto.CodeSourceUnreachable, "/nonexistent/.s.PGSQL.5432"},
		{"no PostgreSQL", "postgres", "host=127.0.0.1 user=x sslmode=disable port=" + port(l), proto.CodeSourceConfig, "no PostgreSQL server"},
		{"no database", "postgres", server.DSN("reader", "nope"), proto.CodeSourceConfig, "3D000"},
		{"no role", "postgres", server.DSN("nobody", "postgres"), proto.CodeSourceCredentials, "28P01"},
		{"password in it", "postgres", "host=x user=y password=marked", proto.CodeSourceConfig, "a password in the dsn is not allowed"},
		{"password in a URL", "postgres", "postgres://u:marked@x/y", proto.CodeSourceConfig, "a password in the dsn is not allowed"},
		{"service", "postgres", "service=marked", proto.CodeSourceConfig, `"service" is not supported in the dsn`},
		{"options", "postgres", "host=x options='-c x=marked'", proto.CodeSourceConfig, `"options" is not supported in the dsn`},
		{"garbled", "postgres", "host='marked", proto.CodeSourceConfig, "garbled"},
		{"no user", "postgres", "host=x dbname=y", proto.CodeSourceConfig, "names no user"},
		{"bad sslmode", "postgres", "host=x user=y sslmode=marked", proto.CodeSourceConfig, "garbled"},
		{"no TLS", "postgres", server.DSN("reader", "postgres") + " sslmode=require", proto.CodeSourceConfig, "does not speak TLS"},
		{"engine", "oracle", "x", proto.CodeSourceConfig, `engine "oracle" is not supported`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := source("db")
			s.Engine, s.DSN = test.engine, test.dsn
			m := newManager(t, sqlsession.Config{}, s)
			e := refuse(t, m, request("SELECT 1"), test.code)
			if !strings.Contains(e.Error(), test.says) || strings.Contains(e.Error(), "marked") || !strings.Contains(e.Error(), `data source "db"`) || strings.Contains(e.Error(), "\n") {
				t.Errorf("got %q, want one line with %q", e, test.says)
			}
			checks := m.Check(t.Context(), "db")
			if last := checks[len(checks)-1]; last.Result != "failed" || last.Remedy == "" || strings.Contains(last.Message, "marked") {
				t.Errorf("check: got %v, want a failure with a remedy", checks)
			}
		})
	}
}

func TestValidateDSN(t *testing.T) {
	good := []string{
		"host=/run/postgresql dbname=warehouse user=reader", "postgres://reader@db.example.com:5433/x?sslmode=require", "host=a,b port=1,2 user=x connect_timeout=3",
	}
	for _, dsn := range good {
		if err := sqlsession.ValidateDSN("postgres", dsn); err != nil {
			t.Errorf("%s: %v", dsn, err)
		}
	}
	for _, dsn := range []string{"host=/run/mysqld/mysqld.sock user=x", "host=db.example.com port=3307 dbname=shop user='a b' sslrootcert=/etc/ca.pem"} {
		if err := sqlsession.ValidateDSN("mysql", dsn); err != nil {
			t.Errorf("%s: %v", dsn, err)
		}
	}
	for _, bad := range []struct{ engine, dsn, says string }{
		{"postgres", "host=x password=marked", "password in the dsn"},
		{"sqlite", "x", "garbled"},
		{"sqlite", "path=app.db", "not absolute"},
		{"sqlite", "path=/srv/../etc/x", "shortest form"},
		{"sqlite", "path=/a mode=rw", "not supported"},
		{"mysql", "x", "garbled"},
		{"mysql", "host=h password=marked", "password in the dsn"},
		{"mysql", "mysql://u:marked@h/x=y", "garbled"},
		{"mysql", "u:marked@tcp(h)/x?a=b", "garbled"},
		{"mysql", "host=h", "names no user"},
		{"mysql", "user=u", "names no host"},
		{"mysql", "host=h user=u port=0", "port"},
		{"mysql", "host=h user=u sslmode=allow", "sslmode"},
		{"mysql", "host=h user=u allowAllFiles=1", "not supported"},
		{"mysql", "host=h host=i user=u", "twice"},
		{"mysql", "host='h user=u", "garbled"},
		{"mysql", "host=h user=u sslrootcert=ca.pem", "absolute"},
		{"mysql", "host=h user=u sslmode=require sslrootcert=/ca.pem", "no effect"},
		{"oracle", "x", `"oracle" is none of`},
		{"postgres", "postgres://u@h:port/x", "garbled"},
		{"postgres", "host", "garbled"},
		{"postgres", "host=x replication=true", "replication"},
		{"postgres", "host=x dbname=y", "names no user"},
		{"postgres", "postgres://h/x", "names no user"},
		{"postgres", "", "names no user"},
	} {
		if err := sqlsession.ValidateDSN(bad.engine, bad.dsn); err == nil || !strings.Contains(err.Error(), bad.says) || strings.Contains(err.Error(), "marked") {
			t.Errorf("%s %s: got %v, want %q", bad.engine, bad.dsn, err, bad.says)
		}
	}
}

func TestKilledProcess(t *testing.T) {
	m := newManager(t, sqlsession.Config{Warm: -1})
	result := make(chan error, 1)
	go func() {
		_, err := m.Run(context.Background(), request("SELECT pg_sleep(60)"), io.Discard)
		result <- err
	}()
	busy := "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND query = 'SELECT pg_sleep(60)' AND state = 'active'"
	eventually(t, "the statement to run", func() bool { return one(t, busy) == "1" })
	pids := sessionProcesses(os.Getpid())
	if len(pids) != 1 {
		t.Fatalf("got %d processes, want 1", len(pids))
	}
	if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	err := <-result
	if proto.CodeOf(err) != proto.CodeSQLSessionDied || !strings.Contains(err.Error(), "was killed (signal 9)") {
		t.Errorf("got %v, want SQL_SESSION_DIED by signal 9", err)
	}
	// The server finds out by itself (client_connection_check_interval).
	eventually(t, "the backend to end", func() bool { return one(t, busy) == "0" })

	// One that is killed while idle is replaced without a word.
	query(t, m, request("SELECT 1"))
	eventually(t, "one idle process", func() bool { return len(sessionProcesses(os.Getpid())) == 1 })
	pid := sessionProcesses(os.Getpid())[0]
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it to be gone", func() bool { return !running(pid) })
	query(t, m, request("SELECT 1"))
}

func TestStoppedProcessIsKilled(t *testing.T) {
	defer sqlsession.SetKillAfter(200 * time.Millisecond)()
	m := newManager(t, sqlsession.Config{Warm: -1})
	r := request("SELECT pg_sleep(60) /* stopped */")
	result := make(chan error, 1)
	go func() {
		_, err := m.Run(context.Background(), r, io.Discard)
		result <- err
	}()
	eventually(t, "the statement to run", func() bool {
		return one(t, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND query = 'SELECT pg_sleep(60) /* stopped */'") == "1"
	})
	pid := sessionProcesses(os.Getpid())[0]
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	m.Cancel(r.QueryID)
	if err := <-result; proto.CodeOf(err) != proto.CodeCancelled {
		t.Errorf("got %v, want CANCELLED", err)
	}
	eventually(t, "the process to be gone", func() bool { return !running(pid) })
}

func TestBackendDies(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	terminate := func(which string) {
		t.Helper()
		eventually(t, "a backend to end", func() bool {
			return one(t, "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'reader' AND "+which) != "0"
		})
	}
	result := make(chan error, 1)
	go func() {
		_, err := m.Run(context.Background(), request("SELECT pg_sleep(60) /* dies */"), io.Discard)
		result <- err
	}()
	terminate("state = 'active' AND query = 'SELECT pg_sleep(60) /* dies */'")
	err := <-result
	var e *proto.Error
	if !errors.As(err, &e) || e.Code != proto.CodeSQL || e.SQL.GetSqlstate() != "57P01" {
		t.Errorf("got %v, want SQL with 57P01", err)
	}
	// Idle and warm ones are replaced without a word, even at once.
	for range 20 {
		query(t, m, request("SELECT 1"))
		terminate("state = 'idle'")
		query(t, m, request("SELECT 1"))
	}
}

func TestDatabaseGoesDownAndComesUp(t *testing.T) {
	own := pgserver.Start(t)
	if err := own.CreateRole(t.Context(), "reader", readerPassword); err != nil {
		t.Fatal(err)
	}
	s := source("db")
	s.DSN = own.SocketDSN("reader", pgserver.Superuser)
	m := newManager(t, sqlsession.Config{}, s)
	query(t, m, request("SELECT 1"))
	result := make(chan error, 1)
	go func() {
		_, err := m.Run(context.Background(), request("SELECT pg_sleep(60)"), io.Discard)
		result <- err
	}()
	eventually(t, "the statement to run", func() bool {
		return oneIn(t, own, "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'") == "1"
	})
	if err := own.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-result; proto.CodeOf(err) != proto.CodeSourceUnreachable || !strings.Contains(err.Error(), "was lost") {
		t.Errorf("killed under a statement: got %v, want SOURCE_UNREACHABLE", err)
	}
	if e := refuse(t, m, request("SELECT 1"), proto.CodeSourceUnreachable); !strings.Contains(e.Error(), own.Host) {
		t.Errorf("while it is down: got %v, want the socket's path", e)
	}
	if err := own.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	query(t, m, request("SELECT 1"))
	if err := own.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	query(t, m, request("SELECT 1")) // the idle session is dead and replaced
}

func TestTLS(t *testing.T) {
	own := pgserver.Start(t, pgserver.Options{TLS: true})
	if err := own.CreateRole(t.Context(), "reader", readerPassword); err != nil {
		t.Fatal(err)
	}
	check := func(dsn string) map[string]*posternv1.Check {
		s := source("db")
		s.DSN = dsn
		m := newManager(t, sqlsession.Config{}, s)
		checks := make(map[string]*posternv1.Check)
		for _, c := range m.Check(t.Context(), "db") {
			checks[c.Name] = c
		}
		if checks["tls"] == nil {
			t.Fatalf("%s: got %v", dsn, checks)
		}
		// Rows, pauses and a cancel over TLS.
		got, _ := query(t, m, request("SELECT repeat('x', 9000), pg_sleep(0.05) FROM generate_series(1, 4)"))
		if len(got.rows) != 4 {
			t.Errorf("got %d rows, want 4", len(got.rows))
		}
		r := request("SELECT pg_sleep(60)")
		r.Timeout = 100 * time.Millisecond
		refuse(t, m, r, proto.CodeTimeout)
		r = request("SELECT i, repeat('x', 300000) FROM generate_series(1, 10) i")
		query(t, m, r)
		return checks
	}
	dsn := strings.ReplaceAll(own.DSN("reader", pgserver.Superuser), "sslmode=disable", "")
	if c := check(dsn + " sslmode=verify-full sslrootcert=" + own.CAFile)["tls"]; c.Result != "ok" || !strings.Contains(c.Message, "verified") {
		t.Errorf("verified: got %v", c)
	}
	if c := check(dsn + " sslmode=require")["tls"]; c.Result != "ok" { // loopback
		t.Errorf("on loopback: got %v", c)
	}
	s := source("db")
	s.DSN = dsn + " sslmode=verify-full"
	m := newManager(t, sqlsession.Config{}, s)
	if e := refuse(t, m, request("SELECT 1"), proto.CodeSourceConfig); !strings.Contains(e.Error(), "sslrootcert") {
		t.Errorf("unknown CA: got %v, want sslrootcert in it", e)
	}
}

func TestCheck(t *testing.T) {
	createRole(t, "plain", "p")
	createRole(t, "mighty", "p", "BYPASSRLS CREATEROLE")
	if err := server.SQL(t.Context(), "GRANT pg_read_server_files, pg_execute_server_program TO mighty"); err != nil {
		t.Fatal(err)
	}
	root, plain, mighty := source("root"), source("plain"), source("mighty")
	root.DSN, root.Password = server.SocketDSN(pgserver.Superuser, pgserver.Superuser), password(server.Password)
	plain.DSN, plain.Password = server.DSN("plain", pgserver.Superuser), password("p")
	mighty.DSN, mighty.Password = server.DSN("mighty", pgserver.Superuser), password("p")
	m := newManager(t, sqlsession.Config{}, source("db"), root, plain, mighty)
	role := map[string][]string{
		"db": {"can write tables", "can create objects"}, "root": {"is a superuser", "can run programs"},
		"mighty": {"bypasses row security", "can create roles", "can read the server's files", "can run programs on the server"},
	}
	for _, name := range []string{"db", "root", "plain", "mighty"} {
		checks := m.Check(t.Context(), name)
		seen := make(map[string]bool)
		for _, c := range checks {
			seen[c.Name] = true
			if c.Name != "role" && (c.Result != "ok" || c.Remedy != "") {
				t.Errorf("%s: got %v, want ok", name, c)
			}
			if c.Name != "role" {
				continue
			}
			if wants := role[name]; wants == nil && c.Result != "ok" || wants != nil && (c.Result != "warning" || c.Remedy == "") {
				t.Errorf("%s: got %v", name, c)
			}
			for _, want := range role[name] {
				if !strings.Contains(c.Message, want) {
					t.Errorf("%s: got %q, want %q in it", name, c.Message, want)
				}
			}
		}
		for _, want := range []string{"reachable", "credentials", "version", "tls", "role", "read-only", "clock"} {
			if !seen[want] {
				t.Errorf("%s: no check %q in %v", name, want, checks)
			}
		}
	}
	if checks := m.Check(t.Context(), "nope"); len(checks) != 1 || checks[0].Result != "failed" {
		t.Errorf("got %v, want one failure", checks)
	}
}

func TestSourcesChange(t *testing.T) {
	m := newManager(t, sqlsession.Config{}, source("db"), source("other"))
	gone := request("SELECT pg_sleep(60)")
	result := make(chan error, 1)
	go func() {
		_, err := m.Run(context.Background(), gone, io.Discard)
		result <- err
	}()
	other := request("SELECT 1")
	other.Source = "other"
	query(t, m, other)
	eventually(t, "the sessions", func() bool { return len(sessionProcesses(os.Getpid())) == 4 })
	kept := sessionProcesses(os.Getpid())
	limited := source("other")
	limited.MaxRows = 1
	m.SetSources([]sqlsession.Source{limited})
	if err := <-result; proto.CodeOf(err) != proto.CodeUnavailable {
		t.Errorf("got %v, want UNAVAILABLE", err)
	}
	eventually(t, "the sessions of db to end", func() bool { return len(sessionProcesses(os.Getpid())) == 2 })
	// The other source keeps its sessions and has its new limit at once.
	for _, pid := range sessionProcesses(os.Getpid()) {
		if !strings.Contains(" "+itoas(kept)+" ", " "+itoas([]int{pid})+" ") {
			t.Errorf("process %d is new", pid)
		}
	}
	other = request("SELECT generate_series(1, 2)")
	other.Source = "other"
	refuse(t, m, other, proto.CodeRowLimit)
	refuse(t, m, request("SELECT 1"), proto.CodeNotFound)
}

func TestIdleSessionsEnd(t *testing.T) {
	m := newManager(t, sqlsession.Config{IdleTimeout: 50 * time.Millisecond})
	query(t, m, request("SELECT 1"))
	eventually(t, "all processes to end", func() bool { return len(sessionProcesses(os.Getpid())) == 0 })
	query(t, m, request("SELECT 1"))
}

func TestClose(t *testing.T) {
	m := sqlsession.New(sqlsession.Config{Logger: quietLog(t), Parser: parser})
	m.SetSources([]sqlsession.Source{source("db")})
	query(t, m, request("SELECT 1"))
	result := make(chan error, 1)
	go func() {
		_, err := m.Run(context.Background(), request("SELECT pg_sleep(60)"), io.Discard)
		result <- err
	}()
	eventually(t, "the statement to run", func() bool {
		return one(t, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND query = 'SELECT pg_sleep(60)'") == "1"
	})
	if err := m.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-result; proto.CodeOf(err) != proto.CodeUnavailable || !errors.Is(err, sqlsession.ErrClosed) && !strings.Contains(err.Error(), "goes away") {
		t.Errorf("got %v, want UNAVAILABLE", err)
	}
	if pids := sessionProcesses(os.Getpid()); len(pids) > 0 {
		t.Errorf("processes %v are left", pids)
	}
	eventually(t, "the backends to end", func() bool {
		return one(t, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader'") == "0"
	})
	refuse(t, m, request("SELECT 1"), proto.CodeUnavailable)
}
