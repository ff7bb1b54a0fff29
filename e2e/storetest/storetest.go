package storetest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/leakwait"
	"github.com/postern-dev/postern/e2e/pgserver"
)

// Dir is a temporary directory of the test in memory, where the host has /dev/shm, else on disk. The store
// syncs every transaction, which a disk that many tests share takes tenths of a second for each; the end of a
// process, which tests can cause, is the same to both.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "postern-test")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// SQLite opens a store in a directory of Dir; the test closes it.
func SQLite(t testing.TB) *store.Store {
	t.Helper()
	return Open(t, store.Config{SQLitePath: filepath.Join(Dir(t), "postern.db")})
}

// Open opens a store; the test closes it.
func Open(t testing.TB, cfg store.Config) *store.Store {
	t.Helper()
	s, err := store.Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// Main wraps testing.M for goleak.VerifyTestMain: it stops the PostgreSQL server
// that the package's tests shared, if any needed one, and waits for goroutines that are about
// to end (e2e/leakwait).
type Main struct{ M *testing.M }

// Run runs the tests.
func (m Main) Run() int {
	code := m.M.Run()
	mu.Lock()
	defer mu.Unlock()
	if server != nil {
		if err := server.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, "stop PostgreSQL:", err)
			return 1
		}
	}
	if code == 0 {
		leakwait.Wait()
	}
	return code
}

var (
	mu        sync.Mutex
	server    *pgserver.Server // shared by the package's tests; guarded by mu
	databases atomic.Int64
)

// Server is the PostgreSQL server that the package's tests share. The package's
// TestMain runs Main.
func Server(t testing.TB) *pgserver.Server {
	t.Helper()
	mu.Lock()
	defer mu.Unlock()
	if server == nil {
		s, err := pgserver.Launch(context.Background(), pgserver.Options{})
		if err != nil {
			t.Fatal(err)
		}
		server = s
	}
	return server
}

// Role is the role of a database made by PostgresConfig, with its password file.
type Role struct {
	Database, Name, Password, PasswordFile string
}

// PostgresConfig makes an empty database with an owner of the same name on the
// shared server.
func PostgresConfig(t testing.TB) (store.Config, Role) {
	t.Helper()
	s := Server(t)
	name := fmt.Sprintf("cp%d", databases.Add(1))
	role := Role{Database: name, Name: name, Password: "first-" + name, PasswordFile: filepath.Join(t.TempDir(), "password")}
	ctx := context.Background()
	if err := s.CreateRole(ctx, name, role.Password); err != nil {
		t.Fatal(err)
	}
	if err := s.CreateDatabase(ctx, name, name); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(role.PasswordFile, []byte(role.Password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return store.Config{PostgresDSN: s.DSN(name, name), PasswordFile: role.PasswordFile}, role
}

// Postgres opens a store in a database of its own on the shared server.
func Postgres(t testing.TB) *store.Store {
	t.Helper()
	cfg, _ := PostgresConfig(t)
	return Open(t, cfg)
}

// Each runs f as a subtest on both engines.
func Each(t *testing.T, f func(t *testing.T, s *store.Store)) {
	t.Helper()
	for name, open := range map[string]func(testing.TB) *store.Store{"sqlite": SQLite, "postgres": Postgres} {
		t.Run(name, func(t *testing.T) { f(t, open(t)) })
	}
}

// Contains reports whether a SQLite store's files hold text, in the clear.
func Contains(t testing.TB, path string, text []byte) bool {
	t.Helper()
	found := false
	for _, suffix := range []string{"", "-wal", "-shm"} {
		content, err := os.ReadFile(path + suffix)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		found = found || strings.Contains(string(content), string(text))
	}
	return found
}
