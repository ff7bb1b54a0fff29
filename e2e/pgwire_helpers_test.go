package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/postern-dev/postern/e2e/freeport"
	"github.com/postern-dev/postern/e2e/nginxtest"
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/e2e/stack"
)

// shop is what clients of PostgreSQL look at: tables with keys and comments, an enum, a view and a
// function.
var shop = []string{
	`create type parity as enum ('odd', 'even')`,
	`create table customers (id int primary key, name text not null, email text unique)`,
	`comment on table customers is 'who buys'`,
	`insert into customers select i, 'customer ' || i, 'c' || i || '@example.com' from generate_series(1, 100) i`,
	`create table orders (id int primary key, customer int not null references customers, amount numeric(12,2) not null default 0, at timestamptz not null, kind parity)`,
	`create index orders_customer on orders (customer)`,
	`insert into orders select i, i % 100 + 1, i * 0.25, timestamptz '2026-01-01' + i * interval '1 minute', (case when i % 2 = 0 then 'even' else 'odd' end)::parity from generate_series(1, 5000) i`,
	`create view totals as select customer, sum(amount) as total from orders group by customer`,
	`create function twice(n int) returns int language sql immutable as 'select n * 2'`,
	`grant usage on schema public to reader`,
	`grant select on all tables in schema public to reader`,
	`analyze`,
}

// endpoint is a control plane with a PostgreSQL port, TLS, and one agent, "lab", whose
// sources are "shop" (read-only) and "desk" (read-write).
type endpoint struct {
	*stack.Stack
	pg         *pgserver.Server
	database   string
	host, port string
	user       string // the token's name
	token      string
}

// newEndpoint starts one on a database of its own; statements fill it. The sources'
// policies are YAML, each line indented by six.
func newEndpoint(t *testing.T, database string, statements []string, policy string) *endpoint {
	t.Helper()
	pg := postgres(t)
	if err := pg.CreateDatabase(t.Context(), database, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pg.SQL(context.WithoutCancel(t.Context()), "DROP DATABASE "+database+" WITH (FORCE)"); err != nil {
			t.Error(err)
		}
	})
	if err := pg.SQLIn(t.Context(), database, statements...); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if _, err := nginxtest.WriteCertificates(dir, "127.0.0.1"); err != nil {
		t.Fatal(err)
	}
	listen, pgListen := freeAddress(t), freeAddress(t)
	s := newStack(t, stack.Options{
		Listen: listen, URL: "https://" + listen, CAFile: filepath.Join(dir, "ca.pem"),
		Args: []string{"--pg-listen", pgListen, "--tls-cert", filepath.Join(dir, "fullchain.pem"), "--tls-key", filepath.Join(dir, "key.pem")},
	})
	e := &endpoint{Stack: s, pg: pg, database: database, user: "ana"}
	e.host, e.port, _ = net.SplitHostPort(pgListen)
	sources := "sources:\n" + mustSource(t, s.Dir, "shop", pg.SocketDSN("reader", database), policy)
	desk, err := stack.Source(s.Dir, "desk", pg.SocketDSN(pgserver.Superuser, database), pg.Password, "      mode: read-write\n      concurrency: 32\n")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Join(t.Context(), "lab", sources+desk); err != nil {
		t.Fatal(err)
	}
	e.token = newToken(t, s, e.user, "analyst")
	// On a busy machine the parser of statements takes longer to start than a statement waits.
	eventually(t, time.Minute, "a first statement", func() error {
		if end := postern(t, s, "sql", "lab/desk", "select 1"); end.code != 0 {
			return errors.New(end.stderr)
		}
		return nil
	})
	return e
}

func freeAddress(t *testing.T) string {
	t.Helper()
	address, err := freeport.Address()
	if err != nil {
		t.Fatal(err)
	}
	return address
}

func newToken(t *testing.T, s *stack.Stack, name, role string) string {
	t.Helper()
	text, err := s.Postern(t.Context(), "token", "create", name, "--role", role)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(text)
}

// env is how libpq and others are told where to connect, with the certificate verified.
func (e *endpoint) env(source string) []string {
	return []string{
		"PGHOST=" + e.host, "PGPORT=" + e.port, "PGUSER=" + e.user, "PGPASSWORD=" + e.token, "PGDATABASE=lab/" + source,
		"PGSSLMODE=verify-full", "PGSSLROOTCERT=" + e.CAFile, "PGTZ=UTC", "LC_ALL=C.UTF-8", "HOME=/nonexistent", "PATH=" + os.Getenv("PATH"),
	}
}

// direct is the same straight to the database, as its superuser.
func (e *endpoint) direct() []string {
	return []string{
		"PGHOST=" + e.pg.Host, fmt.Sprintf("PGPORT=%d", e.pg.Port), "PGUSER=" + pgserver.Superuser, "PGPASSWORD=" + e.pg.Password, "PGDATABASE=" + e.database,
		"PGTZ=UTC", "LC_ALL=C.UTF-8", "HOME=/nonexistent", "PATH=" + os.Getenv("PATH"),
	}
}

// dsn is for drivers in Go.
func (e *endpoint) dsn(source, more string) string {
	return fmt.Sprintf("host=%s port=%s user=%s password=%s dbname=lab/%s sslmode=verify-full sslrootcert=%s %s", e.host, e.port, e.user, e.token, source, e.CAFile, more)
}

func (e *endpoint) connect(t *testing.T, source, more string) *pgx.Conn {
	t.Helper()
	c, err := pgx.Connect(t.Context(), e.dsn(source, more))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(context.Background()) })
	return c
}

// runClient runs a program and returns what it prints, both ways together.
func runClient(t *testing.T, env []string, stdin, program string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env, cmd.Stdin = env, strings.NewReader(stdin)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

// mustClient is runClient for what has to end well.
func mustClient(t *testing.T, env []string, stdin, program string, args ...string) string {
	t.Helper()
	out, err := runClient(t, env, stdin, program, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", filepath.Base(program), strings.Join(args, " "), err, out)
	}
	return out
}

// sqlstate is an error's, or the error itself.
func sqlstate(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code
	}
	return fmt.Sprint(err)
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
