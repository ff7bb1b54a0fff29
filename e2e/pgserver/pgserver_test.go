package pgserver

import (
	"errors"
	"os"
	"testing"

	"github.com/jackc/pgx/v5"
)

func query(t *testing.T, dsn, password, sql string) (string, error) {
	t.Helper()
	config, err := pgx.ParseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	config.Password = password
	conn, err := pgx.ConnectConfig(t.Context(), config)
	if err != nil {
		return "", err
	}
	defer conn.Close(t.Context())
	var got string
	err = conn.QueryRow(t.Context(), sql).Scan(&got)
	return got, err
}

func TestServer(t *testing.T) {
	s := Start(t, Options{TLS: true, Settings: map[string]string{"max_connections": "17"}})
	if got, err := query(t, s.DSN(Superuser, Superuser), s.Password, "SHOW max_connections"); err != nil || got != "17" {
		t.Fatalf("max_connections: got %q, %v, want 17", got, err)
	}
	for _, dsn := range []string{s.DSN(Superuser, Superuser), s.SocketDSN(Superuser, Superuser)} {
		if _, err := query(t, dsn, "wrong", "SELECT 'x'"); err == nil {
			t.Errorf("%s: a wrong password was accepted", dsn)
		}
	}
	if err := s.CreateRole(t.Context(), "reader x", "it's"); err != nil {
		t.Fatal(err)
	}
	if err := s.CreateDatabase(t.Context(), "ware house", "reader x"); err != nil {
		t.Fatal(err)
	}
	tls := s.DSN("reader x", "ware house") + " sslmode=verify-full sslrootcert=" + s.CAFile
	if got, err := query(t, tls, "it's", "SELECT ssl::text FROM pg_stat_ssl WHERE pid = pg_backend_pid()"); err != nil || got != "true" {
		t.Fatalf("over TLS: got %q, %v, want true", got, err)
	}

	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := query(t, s.DSN(Superuser, Superuser), s.Password, "SELECT 'x'"); err == nil {
		t.Error("a killed server answered")
	}
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := query(t, s.DSN("reader x", "ware house"), "it's", "SELECT 'back'"); err != nil || got != "back" {
		t.Fatalf("after a restart: got %q, %v, want back", got, err)
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Stop: got %v, want no directory", err)
	}
}
