package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/tunnel"
)

func TestStanding(t *testing.T) {
	dir := t.TempDir()
	open := func(agent string) *standing {
		t.Helper()
		s, err := openStanding(dir, agent)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	cause := func(s *standing) error {
		ctx, done := s.bound(context.Background())
		defer done()
		return context.Cause(ctx)
	}
	s := open("agt_1")
	running, done := s.bound(context.Background())
	defer done()
	if err := cause(s); err != nil {
		t.Errorf("a new agent: %v", err)
	}
	if now, err := s.restore(); now || err != nil {
		t.Errorf("restored what was not revoked: %v, %v", now, err)
	}
	if now, err := s.revoke(proto.CodeAgentRevoked); !now || err != nil {
		t.Errorf("revoked: %v, %v", now, err)
	}
	if now, err := s.revoke(proto.CodeOrganizationDisabled); now || err != nil {
		t.Errorf("revoked again: %v, %v", now, err)
	}
	<-running.Done()
	for name, err := range map[string]error{"under way": context.Cause(running), "new": cause(s), "after a restart": cause(open("agt_1"))} {
		if proto.CodeOf(err) != proto.CodePolicyDenied || !strings.Contains(fmt.Sprint(err), "this agent was revoked") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := cause(open("agt_2")); err != nil {
		t.Errorf("the host registered anew: %v", err)
	}
	if now, err := s.restore(); !now || err != nil || cause(s) != nil || cause(open("agt_1")) != nil {
		t.Errorf("restored: %v, %v; %v; %v", now, err, cause(s), cause(open("agt_1")))
	}
	if _, err := s.revoke(proto.CodeOrganizationDisabled); err != nil || !strings.Contains(fmt.Sprint(cause(open("agt_1"))), "organization was disabled") {
		t.Errorf("disabled: %v, %v", err, cause(open("agt_1")))
	}
	// A note that nobody can read is no way out.
	if err := os.WriteFile(filepath.Join(dir, revokedFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := cause(open("agt_1")); proto.CodeOf(err) != proto.CodePolicyDenied {
		t.Errorf("with a damaged note: %v", err)
	}
	// A disk that takes no note: it holds all the same, until agentd ends.
	s = &standing{file: filepath.Join(dir, "missing", revokedFile), agentID: "agt_1"}
	s.why, s.stop = context.WithCancelCause(context.Background())
	if now, err := s.revoke(proto.CodeAgentRevoked); !now || !errors.Is(err, os.ErrNotExist) || cause(s) == nil {
		t.Errorf("without a note: %v, %v, %v", now, err, cause(s))
	}
}

// TestRevokedAgentStopsKernelsSQL revokes an agent while its kernel asks a database: what
// runs ends, the next is refused, also after a restart of agentd, and when the agent is
// let in again kernels ask again.
func TestRevokedAgentStopsKernelsSQL(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for kernels' namespaces")
	}
	criutest.Path(t)
	_, source := database(t, "    policy: {mode: read-only, max_rows: 1000}\n")
	c := newTestControl(t)
	l := newLab(t, c, source+"kernels: {specs: [python3], warm: 0, uid_base: 1982000000, sources: [shop]}\n")
	p := startProcess(t, l, unwatched)
	up := c.awaitHello(1)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	id := jupyter.NewID()
	if _, err := kernels(up).StartKernel(ctx, connect.NewRequest(&posternv1.StartKernelRequest{Id: id, Spec: "python3", Principal: ana})); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { endKernels(t, l.path("state/kernels")) })
	var stream io.ReadWriteCloser
	attach := func(up *tunnel.Tunnel) {
		t.Helper()
		var err error
		if stream, err = kernelstream.Dial(ctx, tunnelDoer{up}, &posternv1.KernelChannelsRequest{KernelId: id, Client: "ana", Principal: ana, Resume: true}); err != nil {
			t.Fatal(err)
		}
	}
	run := func(code, want string) {
		t.Helper()
		_, wait := cell(t, stream, code)
		if got := wait(); !strings.Contains(got, want) {
			t.Errorf("%s\nprinted %s\nwant %s", code, got, want)
		}
	}
	attach(up)
	run("import postern, threading, time; print(postern.sql('select 1').scalar())", `1\n`)
	run(`
said = []
def ask(sql):
    try: postern.sql(sql); said.append('fine')
    except postern.Unavailable: pass
    except postern.Error as e: said.append(f'{e.code} {e}')
sleeper = threading.Thread(target=ask, args=['select pg_sleep(600)']); sleeper.start()
def often():
    sleeper.join()
    while True:
        ask('select 2'); time.sleep(.05)
threading.Thread(target=often, daemon=True).start()
print('begun')`, "begun")
	status := func() control.Status {
		s, err := control.Ask(ctx, l.path("run"))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	poll(t, "the statement", func() bool { return len(status().Queries) == 1 })

	c.setRefuse(proto.Errorf(proto.CodeAgentRevoked, "the agent was revoked: register it again with a new key"))
	up.Close(tunnel.ErrRevoked) //nolint:errcheck // it ends
	poll(t, "the refusal of later statements", func() bool {
		refused := 0
		for _, e := range l.entries() {
			if e.Action == "sql.run" && e.Outcome != "done" {
				refused++
			}
		}
		return refused > 3
	})
	_ = stream.Close()
	p.signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	// Nobody reaches the control plane any more: the host knows what it knew.
	last := l.entries()
	c.setRefuse(proto.Errorf(proto.CodeUnavailable, "not now"))
	p = startProcess(t, l, unwatched)
	poll(t, "refusals after a restart", func() bool {
		refused := 0
		for _, e := range l.entries()[len(last):] {
			if e.Action == "sql.run" {
				if e.Outcome == "done" {
					t.Fatalf("a statement ran: %+v", e)
				}
				refused++
			}
		}
		return refused > 3
	})
	c.mu.Lock()
	hellos := len(c.hellos)
	c.mu.Unlock()
	c.setRefuse(nil)
	up = c.awaitHello(hellos + 1)
	poll(t, "the link", func() bool { return status().Link.Up })
	attach(up)
	defer stream.Close() //nolint:errcheck // it ends with the kernel
	run("print(said[0])", "POLICY_DENIED this agent was revoked")
	run("print(said[1])", "POLICY_DENIED this agent was revoked")
	run("print(postern.sql('select 3').scalar())", `3\n`)
	run("print([s for s in said if s != 'fine' and 'this agent was revoked' not in s][:3])", `[]\n`)
	if _, err := kernels(up).StopKernel(ctx, connect.NewRequest(&posternv1.KernelRequest{Id: id, Principal: ana})); err != nil {
		t.Error(err)
	}
	p.signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	if got := l.actions(); strings.Count(got, "agent.revoked done") != 1 || strings.Count(got, "agent.restored done") != 1 {
		t.Errorf("the log has %s", got)
	}
}
