package audit_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto/auditchain"
)

// killEnv names the database of the process that TestKill kills.
const killEnv = "POSTERN_TEST_KILL"

// writeUntilKilled appends from several goroutines and prints a line for each
// entry after Append has returned.
func writeUntilKilled(path string) {
	s, err := store.Open(ctx, store.Config{SQLitePath: path})
	if err != nil {
		panic(err)
	}
	l := newLog(s)
	var mu sync.Mutex
	for g := range 4 {
		go func() {
			for i := 0; ; i++ {
				name := fmt.Sprintf("g%d-%d", g, i)
				if err := l.Append(ctx, auditchain.Entry{Organization: org, Action: "test", Target: name}); err != nil {
					panic(err)
				}
				mu.Lock()
				fmt.Println(name)
				mu.Unlock()
			}
		}()
	}
	select {}
}

// TestKill: what Append acknowledged is there after kill -9, and the chain
// verifies and goes on.
func TestKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "postern.db")
	total := 0
	for round := range 3 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), killEnv+"="+path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var acknowledged []string
		for lines := bufio.NewScanner(out); lines.Scan(); {
			acknowledged = append(acknowledged, lines.Text())
			if len(acknowledged) == 100 {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		_ = cmd.Wait() // killed

		s := storetest.Open(t, store.Config{SQLitePath: path})
		l := newLog(s)
		kept, err := l.Verify(ctx, org)
		n := kept.Entries()
		if err != nil || int(n) < total+len(acknowledged) {
			t.Fatalf("round %d: %d entries, %v; %d were acknowledged", round, n, err, total+len(acknowledged))
		}
		lines, _, err := s.AuditAfter(ctx, org, uint64(total), 1_000_000)
		if err != nil {
			t.Fatal(err)
		}
		var all strings.Builder
		for _, line := range lines {
			all.Write(line)
		}
		for _, name := range acknowledged {
			if !strings.Contains(all.String(), `"target":"`+name+`"`) {
				t.Errorf("round %d: %s was acknowledged and is gone", round, name)
			}
		}
		total = int(n)
	}
}
