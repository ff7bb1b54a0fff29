package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/simulatedvault"
	"github.com/postern-dev/postern/e2e/stack"
)

// TestSimulatedVault gives one source a password and another its users from a
// (simulated) Vault. A rotated password needs no restart; users that Vault made
// are gone when agentd has ended; nothing that Vault said is in a log.
func TestSimulatedVault(t *testing.T) {
	pg := postgres(t)
	sql := func(ctx context.Context, format string, args ...any) error {
		return pg.SQL(ctx, fmt.Sprintf(format, args...))
	}
	server := simulatedvault.Start(simulatedvault.Config{
		MakeUser: func(ctx context.Context, user, password string) error {
			return sql(ctx, "CREATE ROLE %q LOGIN PASSWORD '%s'", user, password)
		},
		DropUser:  func(ctx context.Context, user string) error { return sql(ctx, "DROP ROLE IF EXISTS %q", user) },
		LeaseLife: time.Hour, LongestLease: time.Hour, TokenLife: time.Hour,
	})
	defer server.Close()
	role, secretID := server.AppRole()
	if err := sql(t.Context(), "CREATE ROLE vaulted LOGIN PASSWORD 'marked-password-one'"); err != nil {
		t.Fatal(err)
	}
	server.Put("team/db", map[string]any{"pw": "marked-password-one"})

	s := newStack(t, stack.Options{})
	dir := t.TempDir()
	for name, text := range map[string]string{"ca.pem": string(server.CA()), "secret-id": secretID + "\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	config := fmt.Sprintf(`vault:
  address: %s
  ca_file: %s
  approle: {role_id: %s, secret_id: {file: %s}}
sources:
  - name: kv
    engine: postgres
    dsn: %s
    password: {vault: {kv: secret/team/db, field: pw}}
  - name: made
    engine: postgres
    dsn: %s
    password: {vault: {role: database/creds/reader}}
`, server.URL(), filepath.Join(dir, "ca.pem"), role, filepath.Join(dir, "secret-id"), pg.DSN("vaulted", "postgres"),
		strings.ReplaceAll(pg.DSN("nobody", "postgres"), "user=nobody", ""))
	a, err := s.Join(t.Context(), "a", config)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(source string) ended {
		return postern(t, s, "sql", "a/"+source, "-f", "csv", "SELECT current_user")
	}
	if got := ask("kv"); got.code != 0 || !strings.Contains(got.stdout, "vaulted") {
		t.Fatalf("got %+v", got)
	}
	if got := ask("made"); got.code != 0 || !strings.Contains(got.stdout, "v_u") || len(server.Users()) != 1 {
		t.Fatalf("got %+v, users %v", got, server.Users())
	}
	// Rotation: what runs goes on, and the next connection takes the new one.
	if err := sql(t.Context(), "ALTER ROLE vaulted PASSWORD 'marked-password-two'"); err != nil {
		t.Fatal(err)
	}
	server.Put("team/db", map[string]any{"pw": "marked-password-two"})
	if err := sql(t.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'vaulted'"); err != nil {
		t.Fatal(err)
	}
	if got := ask("kv"); got.code != 0 {
		t.Fatalf("after the rotation: %+v", got)
	}
	server.Put("team/db", map[string]any{"other": "x"})
	if err := sql(t.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'vaulted'"); err != nil {
		t.Fatal(err)
	}
	if got := postern(t, s, "source", "check", "a/kv"); got.code == 0 || !strings.Contains(got.stdout+got.stderr, `no field "pw"`) {
		t.Errorf("check: %+v", got)
	}
	if err := a.Process.Stop(30 * time.Second); err != nil {
		t.Fatal(err)
	}
	if users := server.Users(); len(users) != 0 {
		t.Errorf("users are left: %v", users)
	}
	for _, secret := range []string{"marked-password", secretID, "hvs_"} {
		if strings.Contains(a.Process.Log(), secret) {
			t.Errorf("agentd's log holds %s", secret)
		}
	}
}
