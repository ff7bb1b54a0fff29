//go:build realvault

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/freeport"
)

// TestRealVault does what TestSimulatedVault does with a real Vault, the program
// that POSTERN_VAULTSERVER names: see make vault-test.
func TestRealVault(t *testing.T) {
	pg := postgres(t)
	address, err := freeport.Address()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Getenv("POSTERN_VAULTSERVER"), address)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatalf("POSTERN_VAULTSERVER: %v", err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill() //nolint:errcheck // it has ended
		cmd.Wait()         //nolint:errcheck // it was killed
	})
	v := &realVault{t: t, url: "http://" + address}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if c, err := net.Dial("tcp", address); err == nil {
			c.Close() //nolint:errcheck // it only asked
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("vault does not start")
		}
	}
	made := v.put("sys/init", map[string]any{"secret_shares": 1, "secret_threshold": 1})
	v.token = made["root_token"].(string)
	v.put("sys/unseal", map[string]any{"key": made["keys"].([]any)[0]})
	for deadline := time.Now().Add(time.Minute); !v.ready(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("vault does not become ready")
		}
	}
	v.put("sys/mounts/secret", map[string]any{"type": "kv", "options": map[string]any{"version": "2"}})
	v.put("sys/mounts/database", map[string]any{"type": "database"})
	v.put("sys/auth/approle", map[string]any{"type": "approle"})
	v.put("sys/policies/acl/agentd", map[string]any{"policy": `
path "secret/data/team/*" { capabilities = ["read"] }
path "database/creds/reader" { capabilities = ["read"] }
path "sys/leases/renew" { capabilities = ["update"] }
path "sys/leases/revoke" { capabilities = ["update"] }`})
	v.put("auth/approle/role/agentd", map[string]any{"token_policies": "agentd", "token_ttl": "1h"})
	roleID := v.get("auth/approle/role/agentd/role-id")["role_id"].(string)
	secretID := v.put("auth/approle/role/agentd/secret-id", map[string]any{})["data"].(map[string]any)["secret_id"].(string)
	if err := pg.CreateRole(t.Context(), "vaultadmin", "vaultadmin-password", "SUPERUSER"); err != nil {
		t.Fatal(err)
	}
	v.put("database/config/pg", map[string]any{
		"plugin_name": "postgresql-database-plugin", "allowed_roles": "reader", "username": "vaultadmin", "password": "vaultadmin-password",
		"connection_url": fmt.Sprintf("postgresql://{{username}}:{{password}}@127.0.0.1:%s/postgres?sslmode=disable", strconv.Itoa(pg.Port)),
	})
	v.put("database/roles/reader", map[string]any{
		"db_name": "pg", "default_ttl": "1h", "max_ttl": "2h",
		"creation_statements": `CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}' IN ROLE vaultmade`,
	})
	if err := pg.SQL(t.Context(), "CREATE ROLE vaultmade"); err != nil {
		t.Fatal(err)
	}
	users := func() (n int) {
		conn, err := pg.Connect(context.Background(), "postgres")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.Background()) //nolint:errcheck // it only asked
		if err := conn.QueryRow(context.Background(), "SELECT count(*) FROM pg_auth_members WHERE roleid = 'vaultmade'::regrole").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	withVault(t, vaultServer{v.url, nil, roleID, secretID, func(path string, data map[string]any) {
		v.put("secret/data/"+path, map[string]any{"data": data})
	}, users})
}

type realVault struct {
	t          *testing.T
	url, token string
}

// ask returns what Vault answers; a failure ends the test. Right after a start
// Vault answers 400 or 503 for a moment.
func (v *realVault) ask(method, path string, body any) map[string]any {
	v.t.Helper()
	var raw []byte
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		status, answer := v.once(method, path, body)
		if raw = answer; status < 300 {
			break
		}
		if time.Now().After(deadline) {
			v.t.Fatalf("%s %s: %d %s", method, path, status, raw)
		}
	}
	var out map[string]any
	json.Unmarshal(raw, &out) //nolint:errcheck // no content is an empty answer
	return out
}

func (v *realVault) once(method, path string, body any) (int, []byte) {
	v.t.Helper()
	text, err := json.Marshal(body)
	if err != nil {
		v.t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(v.t.Context(), method, v.url+"/v1/"+path, bytes.NewReader(text))
	if err != nil {
		v.t.Fatal(err)
	}
	r.Header.Set("X-Vault-Token", v.token)
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		v.t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // it was read
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		v.t.Fatal(err)
	}
	return resp.StatusCode, raw
}

func (v *realVault) put(path string, body any) map[string]any {
	v.t.Helper()
	return v.ask(http.MethodPut, path, body)
}

func (v *realVault) get(path string) map[string]any {
	v.t.Helper()
	data, _ := v.ask(http.MethodGet, path, nil)["data"].(map[string]any)
	return data
}

func (v *realVault) ready() bool {
	status, _ := v.once(http.MethodGet, "sys/health", nil)
	return status == http.StatusOK
}
