package store_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// wantRefusal opens a store and expects one line that holds all of want.
func wantRefusal(t *testing.T, cfg store.Config, want ...string) {
	t.Helper()
	s, err := store.Open(ctx, cfg)
	if err == nil {
		_ = s.Close()
		t.Fatalf("it opened, want %q", want)
	}
	for _, text := range want {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("got %q, want %q in it", err, text)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("more than one line: %q", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	wantRefusal(t, store.Config{}, "neither")
	wantRefusal(t, store.Config{SQLitePath: "a", PostgresDSN: "b"}, "choose one")
	wantRefusal(t, store.Config{SQLitePath: filepath.Join(dir, "missing", "postern.db")}, "no such file or directory")
	other := filepath.Join(dir, "other.db")
	if err := os.WriteFile(other, []byte(strings.Repeat("this is no database ", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	wantRefusal(t, store.Config{SQLitePath: other}, other, "not a SQLite database")
	wantRefusal(t, store.Config{PostgresDSN: "host=127.0.0.1 port=1 user=u dbname=d"}, `"d" at 127.0.0.1`, "connect")
	wantRefusal(t, store.Config{PostgresDSN: "host=127.0.0.1 nonsense"}, "the database's address")
	wantRefusal(t, store.Config{PostgresDSN: "host=127.0.0.1 port=1", PasswordFile: filepath.Join(dir, "none")}, "password", "none")
	wantRefusal(t, store.Config{PostgresDSN: "host=127.0.0.1 port=1", PasswordFile: os.DevNull}, "is empty")
}

func TestPasswordInAddress(t *testing.T) {
	for dsn, want := range map[string]bool{
		"postgres://u:hunter2@h/d":                  true,
		"postgresql://u:hunter2@h/d":                true,
		"postgres://u@h/d?password=hunter2":         true,
		"postgres://u@h/d?sslpassword=hunter2":      true,
		"host=h password=hunter2":                   true,
		"password = hunter2 host=h":                 true,
		"host=h sslpassword=hunter2":                true,
		"postgres://u@h:5432/d?sslmode=verify-full": false,
		"postgres:///d?host=/run/postgresql":        false,
		"host=h user=password dbname=d":             false,
		"host=h passfile=/x":                        false,
		"host=h dbname=password":                    false,
		"":                                          false,
	} {
		if got := store.HasPassword(dsn); got != want {
			t.Errorf("%q: got %v, want %v", dsn, got, want)
		}
		if want {
			_, err := store.Open(ctx, store.Config{PostgresDSN: dsn})
			if err == nil || !strings.Contains(err.Error(), "--database-password-file") || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%q: got %v", dsn, err)
			}
		}
	}
}

func TestPreflight(t *testing.T) {
	server := storetest.Server(t)
	run := func(database string, statements ...string) {
		t.Helper()
		if err := server.SQLIn(ctx, database, statements...); err != nil {
			t.Fatal(err)
		}
	}
	// Each step takes one privilege, sees it missed and gives it back by running
	// what the error says.
	cfg, role := storetest.PostgresConfig(t)
	db, owner := role.Database, "owner_"+role.Name
	if err := server.CreateRole(ctx, owner, "x"); err != nil {
		t.Fatal(err)
	}
	run("postgres", fmt.Sprintf("ALTER DATABASE %s OWNER TO %s", db, owner), fmt.Sprintf("REVOKE ALL ON DATABASE %s FROM PUBLIC", db))
	wantRefusal(t, cfg, fmt.Sprintf(`lacks CONNECT on it: run GRANT CONNECT ON DATABASE "%s" TO "%s"`, db, role.Name))
	run("postgres", fmt.Sprintf("GRANT CONNECT ON DATABASE %s TO %s", db, role.Name))

	run(db, "REVOKE ALL ON SCHEMA public FROM PUBLIC")
	wantRefusal(t, cfg, fmt.Sprintf(`lacks USAGE on schema public: run GRANT USAGE, CREATE ON SCHEMA public TO "%s"`, role.Name))
	run(db, fmt.Sprintf("GRANT USAGE ON SCHEMA public TO %s", role.Name))
	wantRefusal(t, cfg, fmt.Sprintf(`lacks CREATE on schema "public", needed to make the tables: run GRANT CREATE ON SCHEMA "public" TO "%s"`, role.Name))
	run(db, fmt.Sprintf("GRANT CREATE ON SCHEMA public TO %s", role.Name))
	s, err := store.Open(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	// A role that owns nothing needs no CREATE, but the tables.
	user := "user_" + role.Name
	if err := server.CreateRole(ctx, user, role.Password); err != nil {
		t.Fatal(err)
	}
	run(db, fmt.Sprintf("GRANT CONNECT ON DATABASE %s TO %s", db, user), fmt.Sprintf("GRANT USAGE ON SCHEMA public TO %s", user))
	cfg.PostgresDSN = server.DSN(user, db)
	grant := fmt.Sprintf(`GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "public" TO "%s"`, user)
	wantRefusal(t, cfg, "lacks SELECT on postern_schema: run "+grant)
	run(db, grant, fmt.Sprintf("REVOKE DELETE ON queries FROM %s", user))
	wantRefusal(t, cfg, "lacks DELETE on queries: run "+grant)
	run(db, grant)
	storetest.Open(t, cfg)

	cfg.PostgresDSN = server.DSN(role.Name, "nowhere")
	wantRefusal(t, cfg, `run CREATE DATABASE "nowhere"`)
	cfg.PostgresDSN = server.DSN(role.Name, db)
	noPassword := cfg
	noPassword.PasswordFile = ""
	t.Setenv("PGPASSFILE", os.DevNull)
	wantRefusal(t, noPassword, "--database-password-file")
	if err := os.WriteFile(cfg.PasswordFile, []byte("wrong"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantRefusal(t, cfg, "refuses the password", cfg.PasswordFile, "ALTER ROLE")
	run("postgres", fmt.Sprintf("ALTER ROLE %s NOLOGIN", user))
	if err := os.WriteFile(cfg.PasswordFile, []byte(role.Password), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.PostgresDSN = server.DSN(user, db)
	wantRefusal(t, cfg, "may log in")
}

// TestPasswordRotation: the role's password changes on a live store, and then the
// file, a moment later; all connections are cut; nobody notices.
func TestPasswordRotation(t *testing.T) {
	server := storetest.Server(t)
	cfg, role := storetest.PostgresConfig(t)
	s := storetest.Open(t, cfg)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				// A statement that is running when its connection is cut may fail; the
				// password must never be the reason.
				if _, err := s.ListOrganizations(ctx); err != nil {
					if code := sqlstate(err); code == "28P01" || proto.CodeOf(err) != proto.CodeUnavailable {
						t.Errorf("%v (%s): %v", err, code, errors.Unwrap(err))
					}
				}
			}
		})
	}
	for i := range 3 {
		password := fmt.Sprint("rotated ", i)
		cut := fmt.Sprintf("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '%s'", role.Name)
		if err := server.SQL(ctx, fmt.Sprintf("ALTER ROLE %s PASSWORD '%s'", role.Name, password), cut); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond) // the operator's other hand
		replace(t, role.PasswordFile, password+"\n")
	}
	close(stop)
	wg.Wait()
	if _, err := s.ListOrganizations(ctx); err != nil {
		t.Error(err)
	}
}

func sqlstate(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code
	}
	return ""
}

// replace changes a file as an operator's tool does: whole.
func replace(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// TestDatabaseRestarts: PostgreSQL is killed and comes back.
func TestDatabaseRestarts(t *testing.T) {
	cfg, _ := storetest.PostgresConfig(t)
	s := storetest.Open(t, cfg)
	if err := storetest.Server(t).Restart(ctx); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	for {
		err := s.Ping(ctx)
		if err == nil {
			break
		}
		if proto.CodeOf(err) != proto.CodeUnavailable || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if _, err := s.CreateOrganization(ctx, "acme", now); err != nil {
		t.Error(err)
	}
}

// TestOpenTogether: control planes that start at once migrate once.
func TestOpenTogether(t *testing.T) {
	postgres, _ := storetest.PostgresConfig(t)
	for name, cfg := range map[string]store.Config{"sqlite": {SQLitePath: filepath.Join(t.TempDir(), "postern.db")}, "postgres": postgres} {
		t.Run(name, func(t *testing.T) {
			var wg sync.WaitGroup
			for range 6 {
				wg.Go(func() {
					s, err := store.Open(ctx, cfg)
					if err != nil {
						t.Error(err)
						return
					}
					if _, err := s.EnsureDefaultOrganization(ctx, now); err != nil {
						t.Error(err)
					}
					if err := s.Close(); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
		})
	}
}

func TestNewerStoreIsRefused(t *testing.T) {
	postgres, _ := storetest.PostgresConfig(t)
	for name, cfg := range map[string]store.Config{"sqlite": {SQLitePath: filepath.Join(t.TempDir(), "postern.db")}, "postgres": postgres} {
		t.Run(name, func(t *testing.T) {
			s := storetest.Open(t, cfg)
			if err := s.Exec(ctx, "INSERT INTO postern_schema (version_id, is_applied) VALUES (99, "+map[string]string{"sqlite": "1", "postgres": "true"}[name]+")"); err != nil {
				t.Fatal(err)
			}
			wantRefusal(t, cfg, "newer control plane", "schema 99", "upgrade")
		})
	}
}

func TestRestartKeepsAll(t *testing.T) {
	path := filepath.Join(t.TempDir(), "with space?&%#.db")
	s, err := store.Open(ctx, store.Config{SQLitePath: path})
	if err != nil {
		t.Fatal(err)
	}
	org, _ := tenants(t, s)
	a, serial, err := join(s, org, newKey(t, s, org, 1).Id, "host")
	if err != nil {
		t.Fatal(err)
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if info, err := os.Stat(path + suffix); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", suffix, info, err)
		}
	}
	// As after a kill: what is in the files now is all there is.
	copied := filepath.Join(t.TempDir(), "copy.db")
	for _, suffix := range []string{"", "-wal"} {
		copyFile(t, path+suffix, copied+suffix)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{path, copied} {
		s := storetest.Open(t, store.Config{SQLitePath: path})
		if got, err := s.FindAgent(ctx, org, "host"); err != nil || got.Id != a.Id {
			t.Errorf("%s: got %v, %v", path, got, err)
		}
		if state, _, _, err := s.IdentityState(ctx, org, a.Id, serial); err != nil || state != store.CertificatePending {
			t.Errorf("%s: got %v, %v", path, state, err)
		}
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	content, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestFull: a full disk is said so, changes nothing, and passes.
func TestFull(t *testing.T) {
	s := storetest.SQLite(t)
	org, _ := tenants(t, s)
	if err := s.LimitPages(ctx, 2); err != nil {
		t.Fatal(err)
	}
	var full error
	for i := range 1000 {
		q := &posternv1.Query{Id: fmt.Sprint("q", i), State: "running", Sql: strings.Repeat("x", 4000), Started: timestamppb.New(now)}
		if full = s.InsertQuery(ctx, org, "t", q); full != nil {
			break
		}
	}
	wantCode(t, full, proto.CodeStorageFull)
	if strings.Contains(full.Error(), "SQLITE") || strings.Contains(full.Error(), "\n") {
		t.Errorf("got %q", full)
	}
	before, err := s.ListQueries(ctx, org, "", 0, false)
	if err != nil {
		t.Errorf("reading a full store: %v", err)
	}
	if err := s.LimitPages(ctx, 1000); err != nil {
		t.Fatal(err)
	}
	if err := s.InsertQuery(ctx, org, "t", &posternv1.Query{Id: "last", State: "running", Started: timestamppb.New(now.Add(time.Hour))}); err != nil {
		t.Errorf("with space again: %v", err)
	}
	if after, err := s.ListQueries(ctx, org, "", 0, false); err != nil || len(after) != len(before)+1 {
		t.Errorf("%d queries, then %d, %v", len(before), len(after), err)
	}
}

func TestCodesOfFailures(t *testing.T) {
	s := storetest.SQLite(t)
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	for name, test := range map[string]struct {
		ctx  context.Context
		err  error
		want proto.Code
	}{
		"none":               {ctx, nil, 0},
		"coded":              {ctx, fmt.Errorf("x: %w", proto.Errorf(proto.CodeNotFound, "y")), proto.CodeNotFound},
		"disk full":          {ctx, &pgconn.PgError{Code: "53100"}, proto.CodeStorageFull},
		"shutting down":      {ctx, &pgconn.PgError{Code: "57P01"}, proto.CodeUnavailable},
		"too many":           {ctx, &pgconn.PgError{Code: "53300"}, proto.CodeUnavailable},
		"password":           {ctx, &pgconn.PgError{Code: "28P01"}, proto.CodeUnavailable},
		"connection cut":     {ctx, io.ErrUnexpectedEOF, proto.CodeUnavailable},
		"missing privilege":  {ctx, &pgconn.PgError{Code: "42501"}, proto.CodeInternal},
		"cancelled":          {cancelled, &pgconn.PgError{Code: "57014"}, proto.CodeCancelled},
		"anything unthought": {ctx, errors.New("x"), proto.CodeInternal},
	} {
		t.Run(name, func(t *testing.T) { wantCode(t, s.Fail(test.ctx, "try", test.err), test.want) })
	}
}

func TestCancelledCaller(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		cancelled, cancel := context.WithCancel(ctx)
		cancel()
		_, err := s.CreateOrganization(cancelled, "acme", now)
		wantCode(t, err, proto.CodeCancelled)
		_, err = s.ListOrganizations(cancelled)
		wantCode(t, err, proto.CodeCancelled)
		if _, err := s.CreateOrganization(ctx, "acme", now); err != nil {
			t.Error(err)
		}
	})
}

// TestHistoryIsBounded: the history of a busy organization ends up at its bound,
// and running queries stay.
func TestHistoryIsBounded(t *testing.T) {
	s := storetest.SQLite(t)
	org, other := tenants(t, s)
	insert := func(org, id, state string, at time.Time) {
		t.Helper()
		if err := s.InsertQuery(ctx, org, "t", &posternv1.Query{Id: id, State: state, Started: timestamppb.New(at)}); err != nil {
			t.Fatal(err)
		}
	}
	insert(org, "long runner", "running", now)
	insert(other, "other", "done", now)
	const keep, more = 1000, 500
	s.KeepQueries(keep)
	for i := range keep + more {
		insert(org, fmt.Sprint("q", i), "done", now.Add(time.Duration(i+1)*time.Millisecond))
	}
	for {
		n, err := s.PruneQueries(ctx, org, now)
		if err != nil {
			t.Fatal(err)
		}
		if n > 300 {
			t.Errorf("%d were left for one batch: pruning does not keep up", n)
		}
		if n == 0 {
			break
		}
	}
	for id, want := range map[string]proto.Code{
		fmt.Sprint("q", more-1): proto.CodeNotFound,
		fmt.Sprint("q", more):   0,
		"long runner":           0,
	} {
		if _, err := s.GetQuery(ctx, org, "", id); proto.CodeOf(err) != want {
			t.Errorf("%s: got %v, want %v", id, err, want)
		}
	}
	if _, err := s.GetQuery(ctx, other, "", "other"); err != nil {
		t.Error(err)
	}
}

// TestSQLiteSettings: what durability and the single writer rest on.
func TestSQLiteSettings(t *testing.T) {
	s := storetest.SQLite(t)
	for name, want := range map[string][3]string{
		"journal_mode": {"wal", "wal", "wal"},
		"synchronous":  {"2", "1", "2"}, // FULL, NORMAL, and the default of what does not write
		"foreign_keys": {"1", "1", "1"},
		"busy_timeout": {"10000", "10000", "10000"},
		"query_only":   {"0", "0", "1"},
	} {
		if got, err := s.Pragmas(ctx, name); err != nil || got != want {
			t.Errorf("%s: got %v, %v, want %v", name, got, err, want)
		}
	}
}
