package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/simulatedvault"
	"github.com/postern-dev/postern/e2e/stack"
)

// vaultServer is a Vault that has a database role "reader", as tests see it.
type vaultServer struct {
	url    string
	ca     []byte // PEM; nil for plain HTTP
	roleID string
	secret string // secret_id
	put    func(path string, data map[string]any)
	users  func() int // that it made and did not drop yet
}

// TestSimulatedVault gives one source a password and another its users from a
// simulated Vault; make vault-test does the same with a real one.
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
	withVault(t, vaultServer{server.URL(), server.CA(), role, secretID, server.Put, func() int { return len(server.Users()) }})
}

// withVault gives one source a password and another its users from a Vault. A
// rotated password needs no restart; users that Vault made are gone when agentd
// has ended; nothing that Vault said is in a log.
func withVault(t *testing.T, server vaultServer) {
	pg := postgres(t)
	sql := func(format string, args ...any) {
		t.Helper()
		if err := pg.SQL(t.Context(), fmt.Sprintf(format, args...)); err != nil {
			t.Fatal(err)
		}
	}
	sql("CREATE ROLE vaulted LOGIN PASSWORD 'marked-password-one'")
	t.Cleanup(func() { pg.SQL(context.Background(), "DROP ROLE vaulted") }) //nolint:errcheck // the server ends soon
	server.put("team/db", map[string]any{"pw": "marked-password-one"})

	s := newStack(t, stack.Options{})
	dir := t.TempDir()
	caFile := ""
	if server.ca != nil {
		caFile = "  ca_file: " + filepath.Join(dir, "ca.pem") + "\n"
	}
	for name, text := range map[string]string{"ca.pem": string(server.ca), "secret-id": server.secret + "\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	config := fmt.Sprintf(`vault:
  address: %s
%s  approle: {role_id: %s, secret_id: {file: %s}}
sources:
  - name: kv
    engine: postgres
    dsn: %s
    password: {vault: {kv: secret/team/db, field: pw}}
  - name: made
    engine: postgres
    dsn: %s
    password: {vault: {role: database/creds/reader}}
`, server.url, caFile, server.roleID, filepath.Join(dir, "secret-id"), pg.DSN("vaulted", "postgres"),
		strings.ReplaceAll(pg.DSN("nobody", "postgres"), "user=nobody", ""))
	root := os.Geteuid() == 0 // kernels need it; the project's machines have it
	if root {
		server.put("team/token", map[string]any{"value": "marked-secret-one", "other": "x"})
		config += "kernels: {specs: [python3], warm: 0, secrets: {vault: {TEAM_TOKEN: {path: secret/team/token}, NO_TOKEN: {path: secret/team/nothing}}}}\n"
	}
	a, err := s.Join(t.Context(), "a", config)
	if err != nil {
		t.Fatal(err)
	}
	if root {
		kernelSecretFromVault(t, s, a, server)
	}
	ask := func(source string) ended {
		return postern(t, s, "sql", "a/"+source, "-f", "csv", "SELECT current_user")
	}
	if got := ask("kv"); got.code != 0 || !strings.Contains(got.stdout, "vaulted") {
		t.Fatalf("got %+v", got)
	}
	if got := ask("made"); got.code != 0 || !strings.Contains(got.stdout, "v") || server.users() != 1 {
		t.Fatalf("got %+v, %d users", got, server.users())
	}
	if root {
		pids := a.Process.ChildrenNamed("egress")
		if len(pids) != 1 {
			t.Fatalf("what asks Vault: %v, want one process", pids)
		}
		rightless(t, pids[0], 1900065795)
		if own := tcpSockets(t, a.Process.PID()); len(own) > 0 {
			t.Errorf("agentd has TCP sockets itself: %q", own)
		}
	}
	// Rotation: what runs goes on, and the next connection takes the new one.
	sql("ALTER ROLE vaulted PASSWORD 'marked-password-two'")
	server.put("team/db", map[string]any{"pw": "marked-password-two"})
	sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'vaulted'")
	if got := ask("kv"); got.code != 0 {
		t.Fatalf("after the rotation: %+v", got)
	}
	server.put("team/db", map[string]any{"other": "x"})
	sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'vaulted'")
	if got := postern(t, s, "source", "check", "a/kv"); got.code == 0 || !strings.Contains(got.stdout+got.stderr, `no field "pw"`) {
		t.Errorf("check: %+v", got)
	}
	if err := a.Process.Stop(30 * time.Second); err != nil {
		t.Fatal(err)
	}
	if n := server.users(); n != 0 {
		t.Errorf("%d users are left", n)
	}
	for _, secret := range []string{"marked-password", "marked-secret", server.secret, "hvs_", "hvs."} {
		if strings.Contains(a.Process.Log(), secret) {
			t.Errorf("agentd's log holds %s", secret)
		}
	}
}

// kernelSecretFromVault gives a kernel what the host reads from Vault, by its name alone.
func kernelSecretFromVault(t *testing.T, s *stack.Stack, a *stack.Agent, server vaultServer) {
	t.Helper()
	t.Cleanup(func() { stopKernels(t, s) }) // should it fail
	if e := postern(t, s, "kernel", "start", "a", "--secret", "NO_TOKEN"); e.code != 3 || !strings.Contains(e.stderr, "secret NO_TOKEN: ") {
		t.Errorf("what Vault does not have: %+v", e)
	}
	id := strings.TrimSpace(must(t, s, "kernel", "start", "a", "--secret", "TEAM_TOKEN"))
	if got := must(t, s, "kernel", "exec", id, "import os; print(os.environ['TEAM_TOKEN'], os.environ['TEAM_TOKEN'][-3:])"); got != "[secret TEAM_TOKEN] one" {
		t.Errorf("the kernel printed %q", got)
	}
	if got := must(t, s, "secret", "list"); !strings.Contains(got, "TEAM_TOKEN  host") {
		t.Errorf("list:\n%s", got)
	}
	server.put("team/token", map[string]any{"value": "marked-secret-two"})
	a.Process.Signal(syscall.SIGHUP) // else it is read again within a minute
	for deadline := time.Now().Add(2 * time.Minute); must(t, s, "kernel", "exec", id, "print(os.environ['TEAM_TOKEN'][-3:])") != "two"; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the kernel has not got what was set anew in Vault")
		}
	}
	findCanaries(t, s.Dir, "marked-secret-one", "marked-secret-two")
	must(t, s, "kernel", "stop", id)
}
