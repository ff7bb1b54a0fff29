package kernel

import (
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/agentd/kernel/internal/shim"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// countingSQL counts what it is asked.
type countingSQL struct {
	mu    sync.Mutex
	asked []string
}

func (c *countingSQL) RunLocal(_ context.Context, r *posternv1.SQLRequest, from string, _ io.Writer) *posternv1.QueryOutcome {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = append(c.asked, from+" "+r.Principal.GetTokenName()+" "+r.Sql)
	return &posternv1.QueryOutcome{}
}

func (c *countingSQL) LocalSources() []LocalSource { return []LocalSource{{Name: "shop"}} }

// Processes of other users, root's too, get no answer, even where the kernel has opened its
// socket to all.
func TestSocketIsOneUsersAlone(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to be other users")
	}
	dir, err := os.MkdirTemp("", "postern-sql-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) }) //nolint:errcheck // a temporary directory
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	const mine, others = 1_980_000_001, 1_980_000_002
	sql := &countingSQL{}
	m := New(Config{Dir: dir, SQL: sql})
	k := m.newKernel(dir, shim.Spec{ID: "k1", Owner: []byte(`{"tokenId":"t","tokenName":"ana"}`), Sandbox: sandbox.Spec{UID: mine, RunDir: dir}})
	ctx, cancel := context.WithCancel(t.Context())
	var serving sync.WaitGroup
	serving.Go(func() { m.serveSQL(ctx, k) })
	defer serving.Wait()
	defer cancel()
	place := filepath.Join(dir, sqlSocket)
	ask := func(uid uint32) string {
		t.Helper()
		c := exec.CommandContext(t.Context(), "/usr/bin/python3", "-S", "-c", `
import socket, struct, sys, time
for i in range(500):
    s = socket.socket(socket.AF_UNIX)
    try: s.connect(sys.argv[1])
    except (FileNotFoundError, ConnectionRefusedError): time.sleep(0.01)
    except PermissionError: sys.exit(print("no permission"))
    else: break
try:
    q = ('{"op":"sql","sql":"select %s"}' % sys.argv[2]).encode()
    s.sendall(b"q" + struct.pack(">I", len(q)) + q)
    print("answered" if s.recv(1) else "hung up")
except (BrokenPipeError, ConnectionResetError): print("hung up")
`, place, map[uint32]string{mine: "1", others: "2", 0: "3"}[uid])
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		c.Dir = "/"
		out, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("as %d: %v: %s", uid, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	if got := ask(mine); got != "answered" {
		t.Errorf("the kernel's own user: %s", got)
	}
	if got := ask(others); got != "no permission" {
		t.Errorf("another user: %s", got)
	}
	if err := os.Chmod(place, 0o666); err != nil { // as the kernel may
		t.Fatal(err)
	}
	for _, uid := range []uint32{others, 0} {
		if got := ask(uid); got != "hung up" {
			t.Errorf("user %d, with the socket open to all: %s", uid, got)
		}
	}
	cancel()
	serving.Wait()
	if len(sql.asked) != 1 || sql.asked[0] != "kernel k1 ana select 1" {
		t.Errorf("asked: %q", sql.asked)
	}
}
