package e2e

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/freeport"
	"github.com/postern-dev/postern/e2e/nginxtest"
	"github.com/postern-dev/postern/e2e/stack"
)

// nginxIdle is after how much silence nginx ends a connection: its default, and
// what docs/nginx/postern.conf says.
const nginxIdle = 60 * time.Second

// silent is how long a statement says nothing: longer than nginx waits.
func silent() time.Duration {
	if long {
		return 3 * nginxIdle
	}
	return nginxIdle + 15*time.Second
}

// TestBehindNginx runs the whole job behind the nginx of docs/nginx.md.
func TestBehindNginx(t *testing.T) {
	t.Parallel()
	listen, err := freeport.Address()
	if err != nil {
		t.Fatal(err)
	}
	front := nginxtest.Start(t, nginxtest.Options{Upstream: listen})
	s := newStack(t, stack.Options{Listen: listen, URL: front.URL, CAFile: front.CAFile})
	join(t, s, "host")
	join(t, s, "idle")
	answers(t, s, "host/db", "select 6 * 7 as answer", "42")
	quiet := startSQL(t, s, "host/db", fmt.Sprintf("select pg_sleep(%d), 'woke' as up", int(silent().Seconds())))
	halfway := startSQL(t, s, "host/db", fmt.Sprintf("select g, case when g = 5000 then pg_sleep(%d) end from generate_series(1, 10000) g", int(silent().Seconds())))
	began := time.Now()

	t.Run("bulk", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		out, err := s.Postern(ctx, "sql", "host/db", "-f", "csv", "select g, repeat('x', 90) from generate_series(1, 300000) g")
		if n := strings.Count(out, "\n"); err != nil || n != 300001 {
			t.Errorf("got %d lines, %v", n, err)
		}
	})
	t.Run("an error after rows", func(t *testing.T) {
		q := startSQL(t, s, "host/db", "select 1 / (200000 - g) from generate_series(1, 300000) g")
		code, said := q.exit(t, patience)
		if code != 1 || !strings.Contains(said, "division by zero") {
			t.Errorf("got exit code %d and %q", code, said[max(0, len(said)-300):])
		}
	})
	t.Run("an error before rows", func(t *testing.T) {
		q := startSQL(t, s, "host/db", "select nope")
		if code, said := q.exit(t, patience); code != 1 || !strings.Contains(said, "42703") {
			t.Errorf("got exit code %d and %q", code, said)
		}
	})
	t.Run("hanging up reaches the database", func(t *testing.T) {
		const mark = "hang-up-behind-nginx"
		q := startSQL(t, s, "host/db", "select pg_sleep(300) /* "+mark+" */")
		underWay(t, mark, 1)
		q.cmd.Process.Kill()
		underWay(t, mark, 0)
	})
	t.Run("a long statement", func(t *testing.T) {
		// 3 MB: more than nginx allows by default, less than the control plane.
		cmd := s.Command(t.Context(), "sql", "host/db", "-f", "csv", "-p", "x="+strings.Repeat("x", 100_000), "select length(:x)")
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "100000") {
			t.Errorf("got %v, %.300s", err, out)
		}
	})
	t.Run("metrics are not open", func(t *testing.T) {
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: front.TLS()}}
		defer client.CloseIdleConnections()
		resp, err := client.Get(front.URL + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("got %s, want 401", resp.Status)
		}
	})
	t.Run("a silent statement", func(t *testing.T) {
		code, said := quiet.exit(t, silent()+patience)
		if code != 0 || !strings.Contains(said, "woke") || time.Since(began) < silent() {
			t.Errorf("got exit code %d and %q after %s", code, said, time.Since(began))
		}
		code, said = halfway.exit(t, patience)
		if n := strings.Count(said, "\n"); code != 0 || n != 10001 {
			t.Errorf("silent between rows: got exit code %d and %d lines: %s", code, n, said[max(0, len(said)-300):])
		}
	})
	t.Run("an idle tunnel", func(t *testing.T) {
		for _, name := range []string{"idle", "host"} {
			a, err := agentState(t, s, name)
			if err != nil || !a.Online || len(a.LinkEvents) != 1 {
				t.Errorf("%s after %s: online %v, link events %v, %v; want one", name, time.Since(began), a.GetOnline(), a.GetLinkEvents(), err)
			}
		}
	})
	if log := front.Log(); strings.Contains(log, "timed out") {
		t.Errorf("nginx says:\n%s", log)
	}
	t.Run("the control plane dies", func(t *testing.T) { controlPlaneDies(t, s, "host") })
}
