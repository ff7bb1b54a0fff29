package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postern-dev/postern/e2e/stack"
)

// background is a command under way, with what it says.
type background struct {
	cmd            *exec.Cmd
	stdin          io.WriteCloser
	stdout, stderr lockedBuffer
	done           chan struct{}
	err            error // once done is closed
}

// begin starts a postern command that ends with the test at the latest.
func begin(t *testing.T, s *stack.Stack, args ...string) *background {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	b := &background{cmd: s.Command(ctx, args...), done: make(chan struct{})}
	b.cmd.Stdout, b.cmd.Stderr = &b.stdout, &b.stderr
	var err error
	if b.stdin, err = b.cmd.StdinPipe(); err == nil {
		err = b.cmd.Start()
	}
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	go func() {
		b.err = b.cmd.Wait()
		close(b.done)
	}()
	t.Cleanup(func() {
		cancel()
		<-b.done
	})
	return b
}

// says waits until the command has printed this.
func (b *background) says(t *testing.T, text string) {
	t.Helper()
	eventually(t, patience, text, func() error {
		select {
		case <-b.done:
			if !strings.Contains(b.stdout.String(), text) {
				t.Fatalf("it ended before it said %q: %v: %s%s", text, b.err, b.stdout.String(), b.stderr.String())
			}
		default:
		}
		if !strings.Contains(b.stdout.String(), text) {
			return errors.New(b.stdout.String())
		}
		return nil
	})
}

// end waits for the command's end.
func (b *background) end(t *testing.T) ended {
	t.Helper()
	select {
	case <-b.done:
	case <-time.After(patience * busy):
		t.Fatalf("%v did not end: %s%s", b.cmd.Args, b.stdout.String(), b.stderr.String())
	}
	return ended{b.cmd.ProcessState.ExitCode(), b.stdout.String(), b.stderr.String()}
}

// dav is a request for a file of the workspace w by WebDAV.
func dav(t *testing.T, s *stack.Stack, method, token string, body io.Reader) (int, []byte, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, s.URL+"/dav/w/dav.bin", body)
	if err != nil {
		t.Fatal(err)
	}
	req.SetBasicAuth("me", token)
	transport := &http.Transport{DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	return resp.StatusCode, got, err
}

// TestReplicasApart has the agent at one replica and everybody's requests at another one, by each way in. Then the
// one in the middle is killed, whose clients come to a third one: what can go on goes on, the rest ends with an error that says
// why, and everything works at once for who comes again, as the agent's tunnel is untouched.
func TestReplicasApart(t *testing.T) {
	needRoot(t)
	t.Parallel()
	set := newReplicas(t, 3)
	one, two, three := set.all[0], set.all[1], set.all[2]
	front, frontPG := newBalancer(t, two.Listen, three.Listen), newBalancer(t, set.clients[1], set.clients[2])
	front.only(0)
	frontPG.only(0)
	user := *two
	user.URL = "http://" + front.address
	s := &user
	agent, err := one.NewAgent("host", "sources:\n"+mustSource(t, one.Dir, "db", set.pg.SocketDSN("reader", "postgres"), "")+
		fmt.Sprintf("kernels: {specs: [python3], warm: 0, uid_base: %d}\n", 1_950_000_000))
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Register(t.Context(), must(t, one, "key", "create")); err != nil {
		t.Fatal(err)
	}
	startAgent(t, agent)
	t.Cleanup(func() { endAllKernels(t, three) })
	eventually(t, patience, "the others see it online", online(t, two, "host", true))
	eventually(t, patience, "the others see it online", online(t, three, "host", true))
	eventually(t, patience, "the database answers by way of it", func() error { // the parser has started then, too
		_, err := s.Postern(t.Context(), "sql", "host/db", "select 1")
		return err
	})
	must(t, s, "workspace", "create", "w")
	token := newToken(t, s, "ana", "analyst")
	dir := t.TempDir()

	connect := func() (*pgx.Conn, error) {
		host, port, _ := net.SplitHostPort(frontPG.address)
		return pgx.Connect(t.Context(), fmt.Sprintf("host=%s port=%s user=ana password=%s dbname=host/db sslmode=disable", host, port, token))
	}
	kernel := must(t, s, "kernel", "start", "host")
	// everything uses all ways in, once.
	everything := func(when string, elsewhere *stack.Stack) {
		t.Helper()
		if got := must(t, s, "kernel", "exec", kernel, "print(6 * 7)"); got != "42" {
			t.Errorf("%s: the kernel says %q", when, got)
		}
		content := bytes.Repeat([]byte(when+" "), 400_000)
		path, back := filepath.Join(dir, "put"), filepath.Join(dir, "got")
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		must(t, s, "file", "put", path, "w:/file.bin")
		for _, at := range []*stack.Stack{s, elsewhere} {
			must(t, at, "file", "get", "w:/file.bin", back)
			if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%s: %d bytes, %v", when, len(got), err)
			}
			if err := os.Remove(back); err != nil {
				t.Fatal(err)
			}
		}
		if code, _, err := dav(t, s, http.MethodPut, token, bytes.NewReader(content)); err != nil || code/100 != 2 {
			t.Errorf("%s: WebDAV: %d, %v", when, code, err)
		}
		if code, got, err := dav(t, elsewhere, http.MethodGet, token, nil); err != nil || code != http.StatusOK || !bytes.Equal(got, content) {
			t.Errorf("%s: WebDAV: %d, %d bytes, %v", when, code, len(got), err)
		}
		conn, err := connect()
		if err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		defer conn.Close(context.Background())                                 //nolint:errcheck // nothing is under way
		eventually(t, patience, when+": PostgreSQL's protocol", func() error { // on a busy machine the parser may be late once
			var answer int
			if err := conn.QueryRow(t.Context(), "select 6 * 7").Scan(&answer); err != nil || answer != 42 {
				return fmt.Errorf("%d, %w", answer, err)
			}
			return nil
		})
		shell := begin(t, s, "sql", "-i", "host/db", "-f", "csv")
		if _, err := io.WriteString(shell.stdin, "begin;\nselect 6 * 7 as answer;\ncommit;\n"); err != nil {
			t.Error(err)
		}
		shell.stdin.Close()
		if e := shell.end(t); e.code != 0 || e.stdout != "answer\n42\n" {
			t.Errorf("%s: the shell: %+v", when, e)
		}
	}
	everything("before", three)
	if n := gaugeOf(t, one, "controlplane_agents_online"); n != 1 {
		t.Fatalf("the agent is not at the first replica: %v", n)
	}

	// Under way when it is killed.
	file := filepath.Join(dir, "slow.ipynb")
	notebookOf(t, file, "x = 6", "import time; time.sleep(4)", "print(x * 7)")
	notebook := begin(t, s, "notebook", "run", file, "--agent", "host")
	eventually(t, patience, "the notebook's second cell", func() error {
		if said := notebook.stderr.String(); !strings.Contains(said, "cell 1 of 3: done") {
			return errors.New(said)
		}
		return nil
	})
	const lines = 80
	cell := begin(t, s, "kernel", "exec", kernel, fmt.Sprintf("import time\nfor i in range(%d):\n  print('line %%03d' %% i)\n  time.sleep(0.05)", lines))
	idle := begin(t, s, "sql", "-i", "host/db", "-f", "csv")
	busyShell := begin(t, s, "sql", "-i", "host/db", "-f", "csv")
	for shell, text := range map[*background]string{idle: "begin;\nselect 1 as before_the_kill;\n", busyShell: "select pg_sleep(300), 'of a shell apart';\n"} {
		if _, err := io.WriteString(shell.stdin, text); err != nil {
			t.Fatal(err)
		}
	}
	conn, err := connect()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background()) //nolint:errcheck // it is gone
	half, rest := io.Pipe()
	uploaded := make(chan error, 1)
	go func() {
		code, text, err := dav(t, s, http.MethodPut, token, half)
		if err == nil {
			err = fmt.Errorf("status %d: %s", code, text)
			if code/100 == 2 {
				err = nil
			}
		}
		half.CloseWithError(errors.New("the request has ended"))
		uploaded <- err
	}()
	if _, err := rest.Write(bytes.Repeat([]byte("half of it "), 100_000)); err != nil {
		t.Fatal(err)
	}
	cell.says(t, "line 010")
	idle.says(t, "before_the_kill\n1\n")
	eventually(t, patience, "the shell's statement runs", func() error {
		if n := replicaStatements(t, set.pg, "of a shell apart"); n != 1 {
			return fmt.Errorf("%d statements", n)
		}
		return nil
	})
	large, big := make([]byte, 64<<20), filepath.Join(dir, "big")
	rand.NewChaCha8([32]byte{}).Read(large) //nolint:errcheck // it never fails
	if err := os.WriteFile(big, large, 0o600); err != nil {
		t.Fatal(err)
	}
	const received = `controlplane_file_bytes_total{direction="in",peer="user"}`
	had := gaugeOf(t, two, received)
	put := begin(t, s, "file", "put", big, "w:/big.bin")
	eventually(t, patience, "some of a large file is there", func() error {
		select {
		case <-put.done:
			return nil
		default:
		}
		if n := gaugeOf(t, two, received) - had; n < 4<<20 {
			return fmt.Errorf("%v bytes", n)
		}
		return nil
	})
	for _, b := range []*background{put, cell, notebook} {
		select {
		case <-b.done:
			t.Logf("%v has ended already", b.cmd.Args[1:3])
		default:
		}
	}
	front.only(1)
	frontPG.only(1)
	two.ControlPlane.Kill()
	for { // until the request has ended, which waits for what is written
		if _, err := rest.Write(make([]byte, 64<<10)); err != nil {
			break
		}
	}

	// The kernel's output goes on, each line once.
	want := ""
	for i := range lines {
		want += fmt.Sprintf("line %03d\n", i)
	}
	if e := cell.end(t); e.code != 0 || e.stdout != want {
		t.Errorf("the cell under way: %+v", e)
	}
	// So does the notebook's run.
	if e, got := notebook.end(t), outputsOf(t, file); e.code != 0 || len(got) != 3 || !strings.Contains(got[2], `"42\n"`) {
		t.Errorf("the notebook under way: %+v, %q", e, got)
	}
	// And the file: what had come need not be sent again.
	if e := put.end(t); e.code != 0 {
		t.Errorf("the file under way: %+v", e)
	}
	must(t, one, "file", "get", "w:/big.bin", big+".back")
	if got, err := os.ReadFile(big + ".back"); err != nil || !bytes.Equal(got, large) {
		t.Errorf("the file under way: %d bytes, %v", len(got), err)
	}
	// The session of a shell that had nothing under way is as it was, its transaction open.
	if _, err := io.WriteString(idle.stdin, "select 2 as after_the_kill;\ncommit;\n"); err != nil {
		t.Error(err)
	}
	idle.stdin.Close()
	if e := idle.end(t); e.code != 0 || e.stdout != "before_the_kill\n1\nafter_the_kill\n2\n" || e.stderr != "" {
		t.Errorf("the shell without a statement under way: %+v", e)
	}
	// A statement, a session of PostgreSQL's protocol and an upload end, and are told.
	busyShell.end(t).said(t, 1, "reach the control plane at")
	eventually(t, patience, "the shell's statement is cancelled in the database", func() error {
		if n := replicaStatements(t, set.pg, "of a shell apart"); n != 0 {
			return fmt.Errorf("%d statements", n)
		}
		return nil
	})
	if _, err := conn.Exec(t.Context(), "select 1"); err == nil {
		t.Error("a session of PostgreSQL's protocol answers after its replica was killed")
	}
	if err := <-uploaded; err == nil {
		t.Error("half an upload was taken")
	}
	if code, got, err := dav(t, three, http.MethodGet, token, nil); err != nil || code != http.StatusOK || !strings.HasPrefix(string(got), "before before ") {
		t.Errorf("the file after half an upload: %d, %.20q, %v", code, got, err)
	}
	everything("after", one)
	t.Logf("the agent attached %v times", gaugeOf(t, one, "controlplane_agent_attaches_total")) // more than once on a very busy machine alone
	if list := must(t, three, "kernel", "list"); strings.Count(list, "\n") != 1 || !strings.Contains(list, kernel) {
		t.Errorf("kernels are left:\n%s", list)
	}
	auditVerifies(t, three)
}
