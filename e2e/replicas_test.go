package e2e

import (
	"context"
	"encoding/binary"
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
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/e2e/stack"
)

// replicaSet is some control planes on one PostgreSQL and one object store.
type replicaSet struct {
	pg  *pgserver.Server
	all []*stack.Stack
	// clients are the addresses for clients of PostgreSQL.
	clients []string
}

// newReplicas starts n control planes. The first one's stack is where agents and tokens
// belong; each one's URL is its own unless url is given.
func newReplicas(t *testing.T, n int, args ...string) *replicaSet {
	t.Helper()
	ctx := t.Context()
	set := &replicaSet{pg: pgserver.Start(t)}
	pg := set.pg
	if err := errors.Join(pg.CreateRole(ctx, "postern", "secret"), pg.CreateDatabase(ctx, "postern", "postern"), pg.CreateRole(ctx, "reader", readerPassword)); err != nil {
		t.Fatal(err)
	}
	shared := t.TempDir()
	file := filepath.Join(shared, "pw")
	if err := os.WriteFile(file, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		peers, err := freeport.Address()
		if err != nil {
			t.Fatal(err)
		}
		set.clients = append(set.clients, freeAddress(t))
		o := stack.Options{Dir: shortDir(t), Bin: binaries(t), Args: append([]string{
			"--database", fmt.Sprintf("postgres://postern@127.0.0.1:%d/postern?sslmode=disable", pg.Port), "--database-password-file", file,
			"--blob", filepath.Join(shared, "blob"), "--peer-listen", peers, "--pg-listen", set.clients[i], "--log-level", "debug",
		}, args...)}
		s, err := stack.New(o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := s.Close(); err != nil {
				t.Errorf("stop replica %d: %v", i, err)
			}
			if t.Failed() {
				t.Logf("replica %d:\n%s", i, s.ControlPlane.Tail(4000))
			}
		})
		if i > 0 {
			first := set.all[0]
			key, err := os.ReadFile(filepath.Join(first.DataDir(), "master.key"))
			if err == nil {
				err = os.MkdirAll(s.DataDir(), 0o700)
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(s.DataDir(), "master.key"), key, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			s.TokenFile = first.TokenFile
		}
		startControlPlane(t, s)
		set.all = append(set.all, s)
	}
	return set
}

// join brings in an agent at a replica.
func (r *replicaSet) join(t *testing.T, at *stack.Stack, name, url string) *stack.Agent {
	t.Helper()
	first := r.all[0]
	a, err := first.NewAgent(name, "sources:\n"+mustSource(t, first.Dir, "db", r.pg.SocketDSN("reader", "postgres"), "      concurrency: 64\n"))
	if err != nil {
		t.Fatal(err)
	}
	a.URL = url
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	key, err := at.NewKey(ctx)
	if err == nil {
		err = a.Register(ctx, key)
	}
	if err = errors.Join(err, a.Start()); err == nil {
		err = a.Online(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestReplicas has an agent at one replica and asks the other one for everything.
func TestReplicas(t *testing.T) {
	t.Parallel()
	set := newReplicas(t, 2)
	one, two := set.all[0], set.all[1]
	set.join(t, one, "host", one.URL)
	eventually(t, patience, "the other replica sees it online", online(t, two, "host", true))
	answers(t, two, "host/db", "select 6 * 7 as answer", "42")

	t.Run("bulk", func(t *testing.T) {
		out, err := two.Postern(t.Context(), "sql", "host/db", "-f", "csv", "select g, repeat('x', 90) from generate_series(1, 300000) g")
		if n := strings.Count(out, "\n"); err != nil || n != 300001 {
			t.Errorf("got %d lines, %v", n, err)
		}
	})
	t.Run("kept rows", func(t *testing.T) {
		must(t, two, "sql", "host/db", "-f", "csv", "select 'kept at the other one' as said")
		eventually(t, patience, "the rows are kept", func() error {
			list := mustJSON[[]struct{ ID, SQL string }](t, two, "query", "list")
			for _, q := range list {
				if strings.Contains(q.SQL, "kept at the other one") {
					if e := postern(t, one, "query", "show", q.ID, "--rows"); e.code != 0 || !strings.Contains(e.stdout, "kept at the other one") {
						return fmt.Errorf("%d: %s%s", e.code, e.stdout, e.stderr)
					}
					return nil
				}
			}
			return errors.New("it is not in the list")
		})
	})
	t.Run("cancel", func(t *testing.T) {
		for _, way := range []struct {
			name        string
			run, cancel *stack.Stack
		}{{"at the replica with the agent", two, one}, {"at the other one", one, two}} {
			text := "select pg_sleep(300), '" + way.name + "'"
			q := startSQL(t, way.run, "host/db", text)
			id := ""
			eventually(t, patience, "it runs", func() error {
				select {
				case <-q.done:
					t.Fatalf("%s: it ended: %v: %s", way.name, q.err, q.out.String())
				default:
				}
				for _, one := range mustJSON[[]struct{ ID, SQL, State string }](t, way.cancel, "query", "list") {
					if one.SQL == text && one.State == "running" {
						id = one.ID
						return nil
					}
				}
				return errors.New("it is not in the list")
			})
			must(t, way.cancel, "query", "cancel", id)
			if code, said := q.exit(t, patience); code == 0 {
				t.Errorf("%s: it was not cancelled: %s", way.name, said)
			}
		}
	})
	t.Run("PostgreSQL clients", func(t *testing.T) {
		token := newToken(t, one, "ana", "analyst")
		host, port, _ := net.SplitHostPort(set.clients[1])
		conn, err := pgx.Connect(t.Context(), fmt.Sprintf("host=%s port=%s user=ana password=%s dbname=host/db sslmode=disable", host, port, token))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.Background()) //nolint:errcheck // it may be gone
		var answer int
		if err := conn.QueryRow(t.Context(), "select 6 * 7").Scan(&answer); err != nil || answer != 42 {
			t.Errorf("got %d, %v", answer, err)
		}
		// The cancel request is a connection of its own, which may come to the other replica.
		failed := make(chan error, 1)
		go func() {
			_, err := conn.Exec(t.Context(), "select pg_sleep(300), 'cancel me from afar'")
			failed <- err
		}()
		eventually(t, patience, "it runs", func() error {
			if n := replicaStatements(t, set.pg, "cancel me from afar"); n != 1 {
				return fmt.Errorf("%d statements", n)
			}
			return nil
		})
		request := binary.BigEndian.AppendUint32(nil, uint32(12+len(conn.PgConn().SecretKey())))
		request = binary.BigEndian.AppendUint32(request, 80877102)
		request = binary.BigEndian.AppendUint32(request, conn.PgConn().PID())
		request = append(request, conn.PgConn().SecretKey()...)
		other, err := net.Dial("tcp", set.clients[0])
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		if _, err := other.Write(request); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-failed:
			var pg *pgconn.PgError
			if !errors.As(err, &pg) || pg.Code != "57014" {
				t.Errorf("it ended with %v", err)
			}
		case <-time.After(patience):
			t.Fatal("it was not cancelled")
		}
	})
	t.Run("revoked", func(t *testing.T) {
		must(t, one, "token", "create", "short", "--role", "analyst")
		set.join(t, two, "doomed", one.URL)
		eventually(t, patience, "it is online", online(t, two, "doomed", true))
		must(t, two, "agent", "revoke", "doomed")
		eventually(t, patience, "it is cut at the other replica", func() error {
			for _, a := range mustJSON[[]struct {
				Name   string
				Online bool
			}](t, one, "agent", "list") {
				if a.Name == "doomed" && a.Online {
					return errors.New("it is online")
				}
			}
			return nil
		})
	})
	auditVerifies(t, one)
	auditVerifies(t, two)

	t.Run("drain", func(t *testing.T) {
		program := filepath.Join(binaries(t), "controlplane")
		finish(t, exec.CommandContext(t.Context(), program, "drain", "--data", t.TempDir())).said(t, 4, "no control plane has run there")
		if e := finish(t, exec.CommandContext(t.Context(), program, "drain", "--data", one.DataDir())); e.code != 0 || e.stderr != "" {
			t.Errorf("drain: exit code %d: %s", e.code, e.stderr)
		}
		select {
		case <-one.ControlPlane.Done():
		case <-time.After(patience):
			t.Error("it runs on")
		}
		finish(t, exec.CommandContext(t.Context(), program, "drain", "--data", one.DataDir())).said(t, 4, "no control plane runs there")
	})
}

// TestReplicaKilled kills the replica that has the agent, without a word.
func TestReplicaKilled(t *testing.T) {
	t.Parallel()
	set := newReplicas(t, 2)
	one, two := set.all[0], set.all[1]
	front := newBalancer(t, one.Listen, two.Listen)
	front.only(0)
	a := set.join(t, one, "host", "http://"+front.address)
	front.only(0, 1)
	eventually(t, patience, "the other replica reaches it", func() error {
		_, err := two.Postern(t.Context(), "sql", "host/db", "select 1")
		return err
	})
	slow := startSQL(t, two, "host/db", "select pg_sleep(300), 'of the killed one'")
	eventually(t, patience, "it runs", func() error {
		if n := replicaStatements(t, set.pg, "of the killed one"); n != 1 {
			return fmt.Errorf("%d statements", n)
		}
		return nil
	})
	one.ControlPlane.Kill()
	if code, said := slow.exit(t, patience); code == 0 || !strings.Contains(said, "replica") {
		t.Errorf("the statement under way ended with %d: %q", code, said)
	}
	took := eventually(t, patience, "the agent is back", func() error {
		_, err := two.Postern(t.Context(), "sql", "host/db", "-f", "csv", "select 6 * 7")
		return err
	})
	t.Logf("agent back %v after the kill", took)
	if !a.Process.Running() {
		t.Error("agentd ended")
	}
	eventually(t, patience, "the statement is cancelled in the database", func() error {
		if n := replicaStatements(t, set.pg, "of the killed one"); n != 0 {
			return fmt.Errorf("%d statements", n)
		}
		return nil
	})
	// Back again, it finds its agent at the other one.
	startControlPlane(t, one)
	answers(t, one, "host/db", "select 6 * 7 as answer", "42")
	auditVerifies(t, two)
}

// replicaStatements is how many statements with this text the database runs.
func replicaStatements(t *testing.T, pg *pgserver.Server, text string) (n int) {
	t.Helper()
	conn, err := pg.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background()) //nolint:errcheck // only read
	row := conn.QueryRow(t.Context(), "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%' || $1 || '%' AND pid <> pg_backend_pid()", text)
	if err := row.Scan(&n); err != nil && !errors.Is(err, pgx.ErrNoRows) {
		t.Fatal(err)
	}
	return n
}
