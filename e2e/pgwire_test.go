package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postern-dev/postern/e2e/pgserver"
)

// python is Debian's, which has the drivers of Debian's packages.
const python = "/usr/bin/python3"

// TestPostgreSQLClients: the clients that people have, through the whole system.
func TestPostgreSQLClients(t *testing.T) {
	e := newEndpoint(t, "clients", shop, "      concurrency: 32\n      functions: [public.twice]\n")
	t.Run("psql", func(t *testing.T) { psqlThrough(t, e) })
	t.Run("psql cancels", func(t *testing.T) { psqlCancels(t, e) })
	t.Run("pg_isready", func(t *testing.T) {
		if out := mustClient(t, e.env("shop"), "", e.pg.Bin("pg_isready")); !strings.Contains(out, "accepting connections") {
			t.Errorf("got %q", out)
		}
	})
	t.Run("pg_dump", func(t *testing.T) {
		want := mustClient(t, e.direct(), "", e.pg.Bin("pg_dump"), "--schema-only", "--no-owner", "--no-privileges")
		got := mustClient(t, e.env("shop"), "", e.pg.Bin("pg_dump"), "--schema-only", "--no-owner", "--no-privileges")
		restrict := regexp.MustCompile(`(?m)^\\(un)?restrict .*$`) // by a random key
		if restrict.ReplaceAllString(got, "") != restrict.ReplaceAllString(want, "") {
			t.Errorf("the schema differs from what pg_dump says of the database itself:\n%s", got)
		}
	})
	t.Run("pgbench", func(t *testing.T) { pgbenchThrough(t, e) })
	for _, driver := range []string{"psycopg2", "psycopg", "asyncpg", "pg8000"} {
		t.Run(driver, func(t *testing.T) {
			if out := mustClient(t, e.env("shop"), "", python, "clients/drivers.py", driver); !strings.HasSuffix(out, "ok\n") {
				t.Errorf("got %s", out)
			}
		})
	}
	t.Run("postgres_fdw", func(t *testing.T) { fdwThrough(t, e) })
	t.Run("pgx", func(t *testing.T) { pgxThrough(t, e) })
	t.Run("history and audit", func(t *testing.T) { historyOfClients(t, e) })
}

// psqlThrough compares what psql prints with what it prints of the database itself.
func psqlThrough(t *testing.T, e *endpoint) {
	for _, script := range []string{
		`\d`, `\d orders`, `\d+ orders`, `\dt+ customers`, `\dv`, `\df`, `\df+ twice`, `\dT+ parity`, `\di`, `\dn`, `\du nobody`, `\l nothing`, `\dp`, `\sf twice`,
		"select 1 as a, 'x' as b \\gdesc",
		"select * from customers order by id limit 3;",
		"\\set FETCH_COUNT 100\nselect id, amount from orders order by id;",
		"select 1; select 2 \\; select 3;",
		"\\copy (select * from customers order by id) to stdout csv header",
		"copy (select id from orders order by id) to stdout;",
		"begin; select count(*) from orders; rollback;",
		"prepare p as select $1::int * 2; execute p(21); deallocate p;",
		"begin; declare c cursor for select id from orders order by id; fetch 3 from c; move 5 in c; fetch 1 from c; close c; commit;",
		"set search_path = public; show search_path; set datestyle = 'German'; select date '2026-11-22'; reset datestyle; show datestyle;",
		"select twice(21);",
		"explain_is_not_sql;",
		"select 1/0;",
		"\\x\nselect * from orders where id = 7;",
		"\\crosstabview",
		"select E'\\x41\\u00e9'::text, null, ''::text;",
	} {
		args := []string{"-X", "-v", "ON_ERROR_STOP=0"}
		got, gerr := runClient(t, e.env("shop"), script+"\n", e.pg.Bin("psql"), args...)
		want, werr := runClient(t, e.direct(), script+"\n", e.pg.Bin("psql"), args...)
		if got != want || (gerr == nil) != (werr == nil) {
			t.Errorf("%s\ngot %v:\n%s\nwant %v:\n%s", script, gerr, got, werr, want)
		}
	}
	// What is refused says so, and psql goes on.
	out := mustClient(t, e.env("shop"), `\set VERBOSITY verbose
delete from orders;
create table t (a int);
insert into customers values (1000, 'x', 'y') returning id;
set default_transaction_read_only = off;
set role postgres;
begin; update orders set amount = 0; select 'in a failed transaction'; rollback;
select pg_read_file('/etc/passwd');
notify news;
select lo_create(0);
copy customers from stdin;
select 'still here';
`, e.pg.Bin("psql"), "-XAt")
	if n := strings.Count(out, "ERROR:"); n != 11 || !strings.HasSuffix(out, "still here\n") {
		t.Errorf("%d errors, want 11:\n%s", n, out)
	}
	if got := mustClient(t, e.direct(), "", e.pg.Bin("psql"), "-XAtc", "select count(*), sum(amount) from orders"); got != "5000|3125625.00\n" {
		t.Errorf("the orders are now %s", got)
	}
	// The other source writes.
	out = mustClient(t, e.env("desk"), "create table notes (a int, b text);\ncopy notes from stdin;\n1\tone\n2\ttwo\n\\.\nbegin; insert into notes values (3, 'three'); commit;\nbegin; delete from notes; rollback;\nselect count(*) from notes;\ndrop table notes;\n",
		e.pg.Bin("psql"), "-XAt")
	if !strings.Contains(out, "COPY 2\n") || !strings.Contains(out, "\n3\n") {
		t.Errorf("got %s", out)
	}
}

// psqlCancels: Ctrl-C ends the statement in the database.
func psqlCancels(t *testing.T, e *endpoint) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, e.pg.Bin("psql"), "-XAt")
	cmd.Env, cmd.Stdin = e.env("shop"), strings.NewReader("select 'mark of the cancelled', pg_sleep(60);\n")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	underWay(t, "mark of the cancelled", 1)
	cmd.Process.Signal(syscall.SIGINT)
	// A script ends with its cancelled statement, by psql's own rule.
	if err := cmd.Wait(); err == nil || !strings.Contains(out.String(), "canceling statement due to user request") || strings.Contains(out.String(), "terminat") {
		t.Errorf("got %v:\n%s", err, out.String())
	}
	underWay(t, "mark of the cancelled", 0)
}

func pgbenchThrough(t *testing.T, e *endpoint) {
	mustClient(t, e.direct(), "", e.pg.Bin("pgbench"), "-i", "-q")
	if err := e.pg.SQLIn(t.Context(), e.database, "grant select on all tables in schema public to reader"); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []string{"simple", "extended", "prepared"} {
		out := mustClient(t, e.env("shop"), "", e.pg.Bin("pgbench"), "-S", "-n", "-c", "4", "-t", "200", "-M", mode)
		if !strings.Contains(out, "number of transactions actually processed: 800/800") || !strings.Contains(out, "number of failed transactions: 0") {
			t.Errorf("%s:\n%s", mode, out)
		}
	}
	script := filepath.Join(t.TempDir(), "pipeline.sql")
	writeFile(t, script, "\\startpipeline\nselect abalance from pgbench_accounts where aid = 1;\nselect 2;\nselect 3;\n\\endpipeline\n")
	out := mustClient(t, e.env("shop"), "", e.pg.Bin("pgbench"), "-n", "-c", "2", "-t", "100", "-M", "extended", "-f", script)
	if !strings.Contains(out, "processed: 200/200") {
		t.Errorf("a pipeline:\n%s", out)
	}
	if out, err := runClient(t, e.env("shop"), "", e.pg.Bin("pgbench"), "-n", "-t", "1"); err == nil || !strings.Contains(out, "read-only") {
		t.Errorf("a benchmark that writes: %v\n%s", err, out)
	}
}

// fdwThrough: another PostgreSQL reads the tables as foreign ones.
func fdwThrough(t *testing.T, e *endpoint) {
	other, err := pgserver.Launch(t.Context(), pgserver.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Stop() })
	ca := filepath.Join(other.Dir, "ca.pem")
	writeFile(t, ca, readFile(t, e.CAFile))
	options := fmt.Sprintf("host '%s', port '%s', dbname 'lab/shop', sslmode 'verify-full', sslrootcert '%s'", e.host, e.port, ca)
	if err := other.SQL(t.Context(), "create extension postgres_fdw",
		"create server postern foreign data wrapper postgres_fdw options ("+options+")",
		fmt.Sprintf("create user mapping for postgres server postern options (user '%s', password '%s')", e.user, e.token),
		"import foreign schema public limit to (customers, orders) from server postern into public",
	); err == nil || !strings.Contains(err.Error(), "parity") {
		t.Errorf("without the enum: %v", err) // what postgres_fdw says of any server
	}
	if err := other.SQL(t.Context(), "create type parity as enum ('odd', 'even')", "import foreign schema public limit to (customers, orders) from server postern into public"); err != nil {
		t.Fatal(err)
	}
	conn, err := other.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	for query, want := range map[string]string{
		"select count(*)::text from orders": "5000",
		"select sum(o.amount)::text from orders o join customers c on c.id = o.customer where c.name = 'customer 7'": "30700.00",
		"select string_agg(name, ',' order by id) from (select * from customers order by id limit 3) x":              "customer 1,customer 2,customer 3",
	} {
		var got string
		if err := conn.QueryRow(t.Context(), query).Scan(&got); err != nil || got != want {
			t.Errorf("%s: got %q, %v, want %q", query, got, err, want)
		}
	}
	if _, err := conn.Exec(t.Context(), "delete from orders where id = 1"); sqlstate(err) != "25006" {
		t.Errorf("a foreign delete: %v", err)
	}
	var n int
	if err := conn.QueryRow(t.Context(), "select count(*) from orders").Scan(&n); err != nil || n != 5000 {
		t.Errorf("after the refusal: %d, %v", n, err)
	}
}

// pgxThrough: batches, pipelines, copies and errors by the driver of Go.
func pgxThrough(t *testing.T, e *endpoint) {
	c := e.connect(t, "shop", "")
	ctx := t.Context()
	var batch pgx.Batch
	for i := range 100 {
		batch.Queue("select $1::int + $2::int", i, i)
	}
	results := c.SendBatch(ctx, &batch)
	for i := range 100 {
		var got int
		if err := results.QueryRow().Scan(&got); err != nil || got != 2*i {
			t.Fatalf("batch: got %d, %v", got, err)
		}
	}
	if err := results.Close(); err != nil {
		t.Error(err)
	}
	for statement, state := range map[string]string{
		"delete from orders": "25006", "select * from nowhere": "42P01", "select 1/0": "22012", "create temp table t (a int)": "25006",
		"set session authorization postgres": "42501", "select pg_sleep(1), pg_terminate_backend(1)": "42501", "selec 1": "42601",
	} {
		for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeSimpleProtocol} {
			rows, err := c.Query(ctx, statement, mode)
			if err == nil {
				rows.Close()
				err = rows.Err()
			}
			if sqlstate(err) != state {
				t.Errorf("%s (%s): got %v, want %s", statement, mode, err, state)
			}
		}
	}
	var n int
	if err := c.QueryRow(ctx, "select count(*) from orders").Scan(&n); err != nil || n != 5000 {
		t.Errorf("after the refusals: %d, %v", n, err)
	}
	tx, err := c.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadWrite})
	if err == nil {
		tx.Rollback(ctx)
	}
	if sqlstate(err) != "25006" {
		t.Errorf("a transaction that wants to write: %v", err)
	}
	desk := e.connect(t, "desk", "")
	if _, err := desk.Exec(ctx, "create temp table copied (a int, b text)"); err != nil {
		t.Fatal(err)
	}
	copied, err := desk.CopyFrom(ctx, pgx.Identifier{"copied"}, []string{"a", "b"}, pgx.CopyFromSlice(10000, func(i int) ([]any, error) { return []any{i, "text"}, nil }))
	if err != nil || copied != 10000 {
		t.Errorf("copy from: %d, %v", copied, err)
	}
	if err := desk.QueryRow(ctx, "select count(*) from copied").Scan(&n); err != nil || n != 10000 {
		t.Errorf("copied: %d, %v", n, err)
	}
	for _, c := range []struct{ more, state string }{
		{"options='-c default_transaction_read_only=off'", "42501"},
		{"role=postgres", "42501"},
		{"replication=database", "0A000"},
		{"dbname=lab/elsewhere", "3D000"},
		{"dbname=elsewhere/shop", "3D000"},
		{"user=bob", "28P01"},
		{"sslmode=disable", ""},
		{"search_path=pg_catalog", ""},
	} {
		conn, err := pgx.Connect(ctx, e.dsn("shop", c.more))
		if err == nil {
			conn.Close(ctx)
		}
		if c.state == "" && err != nil || c.state != "" && sqlstate(err) != c.state {
			t.Errorf("%s: got %v, want %q", c.more, err, c.state)
		}
	}
}

// historyOfClients: what all of them did is in the history and in both chains.
func historyOfClients(t *testing.T, e *endpoint) {
	c := e.connect(t, "shop", "")
	if _, err := c.Exec(t.Context(), "select 'seen in the history'"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Exec(t.Context(), "delete from orders where id = 4711"); sqlstate(err) != "25006" {
		t.Fatal(err)
	}
	type entry struct {
		ID, Agent, Source, TokenName, SQL, State string
		Rows                                     json.Number
	}
	var all []entry
	eventually(t, time.Minute, "the statements in the history", func() error {
		out, err := e.Postern(t.Context(), "query", "list", "--limit", "1000", "-o", "json")
		if err != nil {
			return err
		}
		if !strings.Contains(out, "seen in the history") || !strings.Contains(out, "4711") {
			return fmt.Errorf("they are not there")
		}
		return json.Unmarshal([]byte(out), &all)
	})
	i := slices.IndexFunc(all, func(q entry) bool { return strings.Contains(q.SQL, "seen in the history") })
	if q := all[i]; q.State != "done" || q.Agent != "lab" || q.Source != "shop" || q.Rows != "1" {
		t.Errorf("got %+v", q)
	}
	if q := all[slices.IndexFunc(all, func(q entry) bool { return strings.Contains(q.SQL, "4711") })]; q.State != "denied" {
		t.Errorf("got %+v", q)
	}
	for _, q := range all {
		if q.State == "running" {
			t.Errorf("it is said to run still: %+v", q)
		}
	}

	// One that runs is listed, and can be cancelled by its id.
	failed := make(chan error, 1)
	go func() {
		_, err := c.Exec(t.Context(), "select 'runs for a while', pg_sleep(60)")
		failed <- err
	}()
	id := ""
	eventually(t, time.Minute, "the running statement in the history", func() error {
		out, err := e.Postern(t.Context(), "query", "list", "--running", "-o", "json")
		if err != nil {
			return err
		}
		var running []entry
		if err := json.Unmarshal([]byte(out), &running); err != nil {
			return err
		}
		if len(running) != 1 {
			return fmt.Errorf("%d run", len(running))
		}
		id = running[0].ID
		return nil
	})
	if out, err := e.Postern(t.Context(), "query", "cancel", id); err != nil {
		t.Errorf("cancel: %s, %v", out, err)
	}
	if err := <-failed; sqlstate(err) != "57014" {
		t.Errorf("the cancelled statement: %v", err)
	}
	out, err := e.Postern(t.Context(), "audit", "verify", "-o", "json")
	if err != nil {
		t.Errorf("verify: %v\n%s", err, out)
	}

	// Revoking the token ends its sessions at once.
	began := time.Now()
	if _, err := e.Postern(t.Context(), "token", "revoke", e.user); err != nil {
		t.Fatal(err)
	}
	_, err = c.Exec(t.Context(), "select 1")
	if sqlstate(err) != "57P01" {
		t.Errorf("after the revocation (%s): %v", time.Since(began), err)
	}
}
