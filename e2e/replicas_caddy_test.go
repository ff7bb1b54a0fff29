package e2e

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/freeport"
	"github.com/postern-dev/postern/e2e/nginxtest"
)

// startCaddy runs the Caddy of docs/caddy before two replicas and returns its URL and the file with
// the certificate to trust.
func startCaddy(t *testing.T, upstreams [2]string) (url, caFile string) {
	t.Helper()
	program, err := exec.LookPath("caddy")
	if err != nil {
		t.Fatal("caddy is missing: run packaging/dev/deps.sh caddy")
	}
	listen, err := freeport.Address()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if _, err := nginxtest.WriteCertificates(dir, "127.0.0.1"); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../docs/caddy/Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	site := string(text)
	for _, r := range [][2]string{
		{"\ncp.example.com {\n", "\n{\n\tadmin off\n\tauto_https disable_redirects\n}\nhttps://" + listen + " {\n\ttls " + dir + "/fullchain.pem " + dir + "/key.pem\n"},
		{"10.0.0.5:8080", upstreams[0]},
		{"10.0.0.6:8080", upstreams[1]},
	} {
		if strings.Count(site, r[0]) != 1 {
			t.Fatalf("the Caddyfile does not have %q once", r[0])
		}
		site = strings.Replace(site, r[0], r[1], 1)
	}
	file := filepath.Join(dir, "Caddyfile")
	log, err := os.Create(filepath.Join(dir, "log"))
	if err == nil {
		err = os.WriteFile(file, []byte(site), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(program, "run", "--config", file, "--adapter", "caddyfile")
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		cmd.Wait() //nolint:errcheck // it is stopped by a signal
		close(done)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill() //nolint:errcheck // it may have ended
		<-done
		if t.Failed() {
			said, _ := os.ReadFile(log.Name())
			t.Logf("caddy: %s", said[max(0, len(said)-3000):])
		}
	})
	eventually(t, patience, "caddy listens", func() error {
		select {
		case <-done:
			said, _ := os.ReadFile(log.Name())
			t.Fatalf("caddy ended: %s", said)
		default:
		}
		conn, err := net.DialTimeout("tcp", listen, time.Second)
		if err != nil {
			return err
		}
		return conn.Close()
	})
	return "https://" + listen, filepath.Join(dir, "ca.pem")
}

// TestReplicasBehindCaddy runs the whole job behind the Caddy of docs/caddy.md, and stops a
// replica.
func TestReplicasBehindCaddy(t *testing.T) {
	t.Parallel()
	set := newReplicas(t, 2, "--drain-delay", "3s")
	one, two := set.all[0], set.all[1]
	url, ca := startCaddy(t, [2]string{one.Listen, two.Listen})
	// Everything goes through Caddy from here on.
	front := *one
	front.URL, front.CAFile = url, ca
	one.CAFile = ca
	for i := range 2 {
		set.join(t, one, fmt.Sprintf("host%d", i), url)
	}
	one.CAFile = ""
	for i := range 6 {
		answers(t, &front, fmt.Sprintf("host%d/db", i%2), "select 6 * 7 as answer", "42")
	}
	out, err := front.Postern(t.Context(), "sql", "host0/db", "-f", "csv", "select g, repeat('x', 90) from generate_series(1, 300000) g")
	if n := strings.Count(out, "\n"); err != nil || n != 300001 {
		t.Errorf("got %d lines, %v", n, err)
	}
	slow := startSQL(t, &front, "host0/db", "select pg_sleep(2), 'went on'")
	eventually(t, patience, "it runs", func() error {
		if n := replicaStatements(t, set.pg, "went on"); n != 1 {
			return fmt.Errorf("%d statements", n)
		}
		return nil
	})
	two.ControlPlane.Signal(syscall.SIGTERM)
	for i := range 6 {
		answers(t, &front, fmt.Sprintf("host%d/db", i%2), "select 6 * 7 as answer", "42")
	}
	if code, said := slow.exit(t, patience); code != 0 || !strings.Contains(said, "went on") {
		t.Errorf("the statement under way ended with %d: %s", code, said)
	}
	select {
	case <-two.ControlPlane.Done():
	case <-time.After(patience):
		t.Fatal("the replica does not stop")
	}
	eventually(t, patience, "both agents are at the other replica", func() error {
		return errors.Join(online(t, one, "host0", true)(), online(t, one, "host1", true)())
	})
	for i := range 4 {
		answers(t, &front, fmt.Sprintf("host%d/db", i%2), "select 6 * 7 as answer", "42")
	}
}
