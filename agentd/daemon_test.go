package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/agentd/audit"
	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/agentd/identity"
	"github.com/postern-dev/postern/e2e/freeport"
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

const marked = "marked-secret-4711"

// lab is a host: a state directory, a configuration and a daemon.
type lab struct {
	t      *testing.T
	c      *testControl
	dir    string
	d      *Daemon
	log    *syncBuffer
	cancel context.CancelFunc
	ended  chan error
}

// syncBuffer is a log that two goroutines may touch.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func newLab(t *testing.T, c *testControl, sources string) *lab {
	t.Helper()
	l := &lab{t: t, c: c, dir: t.TempDir()}
	l.configure(sources)
	r := &registerCommand{url: c.web.URL, keyFile: c.keyFile(t), name: "wish", out: io.Discard, errs: os.Stderr, in: os.Stdin}
	r.config, r.state = l.path("agentd.yaml"), l.path("state")
	r.given = func(string) bool { return true }
	if err := r.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *lab) path(name string) string { return filepath.Join(l.dir, name) }

func (l *lab) configure(rest string) {
	l.t.Helper()
	if err := os.WriteFile(l.path("agentd.yaml"), []byte("url: "+l.c.web.URL+"\n"+rest), 0o600); err != nil {
		l.t.Fatal(err)
	}
}

// start runs a daemon until stop, or the test's end.
func (l *lab) start() {
	l.t.Helper()
	level := new(slog.LevelVar)
	l.log = &syncBuffer{}
	l.d = NewDaemon(slog.New(slog.NewTextHandler(l.log, &slog.HandlerOptions{Level: slog.LevelDebug})), level)
	l.d.places.config, l.d.state = l.path("agentd.yaml"), l.path("state")
	l.d.runtime = l.path("run")
	l.d.given = func(string) bool { return true }
	l.d.Backoff = tunnel.BackoffConfig{Min: 10 * time.Millisecond, Max: 100 * time.Millisecond}
	if err := l.d.Validate(); err != nil {
		l.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	l.cancel, l.ended = cancel, make(chan error, 1)
	ready := make(chan struct{})
	go func() { l.ended <- l.d.Run(ctx, func() { close(ready) }) }()
	l.t.Cleanup(l.stop)
	select {
	case <-ready:
	case err := <-l.ended:
		l.ended <- err
		l.t.Fatal(err)
	}
}

func (l *lab) stop() {
	l.t.Helper()
	if l.cancel == nil {
		return
	}
	l.cancel()
	l.cancel = nil
	if err := <-l.ended; err != nil {
		l.t.Errorf("the daemon ended with %v", err)
	}
	if l.t.Failed() {
		l.t.Log(l.log.String())
	}
	if strings.Contains(l.log.String(), marked) {
		l.t.Error("the log shows the password")
	}
}

// entries reads the audit log and verifies it.
func (l *lab) entries() []auditchain.Entry {
	l.t.Helper()
	if _, err := audit.Verify(l.path("state")); err != nil {
		l.t.Error(err)
	}
	var all []auditchain.Entry
	if err := audit.List(l.path("state"), 1, func(_ []byte, e auditchain.Entry) error {
		all = append(all, e)
		return nil
	}); err != nil {
		l.t.Error(err)
	}
	return all
}

// actions are those of the entries, with outcomes.
func (l *lab) actions() string {
	l.t.Helper()
	var out []string
	for _, e := range l.entries() {
		out = append(out, strings.TrimSpace(e.Action+" "+e.Outcome))
	}
	return strings.Join(out, ", ")
}

// database is a PostgreSQL with a reader, and its data source.
func database(t *testing.T, policy string) (pg *pgserver.Server, source string) {
	t.Helper()
	pg = pgserver.Start(t)
	ctx := t.Context()
	if err := pg.CreateRole(ctx, "reader", marked); err != nil {
		t.Fatal(err)
	}
	if err := pg.CreateDatabase(ctx, "shop", "reader"); err != nil {
		t.Fatal(err)
	}
	pw := filepath.Join(t.TempDir(), "pw")
	if err := os.WriteFile(pw, []byte(marked+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return pg, fmt.Sprintf("sources:\n  - name: shop\n    engine: postgres\n    dsn: %s\n    password: {file: %s}\n%s", pg.DSN("reader", "shop"), pw, policy)
}

func TestRegisterRunQuery(t *testing.T) {
	_, source := database(t, "    policy: {max_rows: 10}\n")
	c := newTestControl(t)
	l := newLab(t, c, source)
	l.start()
	up := c.awaitHello(1)
	hello := c.hellos[0]
	if len(hello.Sources) != 1 || hello.Sources[0].MaxRows != 10 || hello.Host.Hostname == "" || hello.AuditHead.Sequence < 2 {
		t.Errorf("hello %v", hello)
	}
	ctx := t.Context()
	if r := c.ask(ctx, up, "q1", "shop", "select i, 'x' from generate_series(1, 5) i"); r.err != nil || r.outcome.Rows != 5 || len(r.rows) == 0 {
		t.Errorf("select: %v, %v", r.outcome, r.err)
	}
	for _, tt := range []struct {
		id, source, sql string
		want            proto.Code
	}{
		{"q2", "shop", "create table x ()", proto.CodePolicyDenied},
		{"q3", "nope", "select 1", proto.CodeNotFound},
		{"q4", "shop", "select * from missing", proto.CodeSQL},
		{"q5", "shop", "select generate_series(1, 20)", proto.CodeRowLimit},
	} {
		if r := c.ask(ctx, up, tt.id, tt.source, tt.sql); proto.CodeOf(r.err) != tt.want || strings.Contains(r.err.Error(), marked) {
			t.Errorf("%s: got %v", tt.sql, r.err)
		}
	}
	host := posternv1connect.NewHostServiceClient(&http.Client{Transport: up.Transport(tunnel.Control)}, "http://agent")
	if r, err := host.HostStatus(ctx, connect.NewRequest(&posternv1.HostStatusRequest{})); err != nil || len(r.Msg.Sources) != 1 {
		t.Errorf("status %v, %v", r, err)
	}
	checked, err := host.CheckSource(ctx, connect.NewRequest(&posternv1.CheckSourceRequest{Source: "shop"}))
	if err != nil || len(checked.Msg.Checks) < 3 || checked.Msg.Checks[0].Result != "ok" {
		t.Errorf("check %v, %v", checked, err)
	}
	read, err := host.ReadAudit(ctx, connect.NewRequest(&posternv1.ReadAuditRequest{From: 1}))
	if err != nil {
		t.Fatal(err)
	}
	v := auditchain.NewVerifier(auditchain.Head{})
	for _, line := range read.Msg.Entries {
		if err := v.Add(line); err != nil {
			t.Error(err)
		}
	}
	metrics, err := (&http.Client{Transport: up.Transport(tunnel.Control)}).Get("http://agent" + proto.MetricsPath)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(metrics.Body)
	metrics.Body.Close() //nolint:errcheck // read to its end
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`agentd_queries_total{outcome="done"} 1`, `agentd_queries_total{outcome="denied"} 1`, "agentd_link_up 1", `agentd_link_transitions_total{state="up"} 1`,
		"agentd_audit_entries_total", "agentd_certificate_expiry_timestamp_seconds", "agentd_build_info", "postern_tunnel_", "go_goroutines", "process_open_fds",
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	documented, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^# TYPE ((agentd|postern)_\w+)`).FindAllStringSubmatch(string(text), -1) {
		if !regexp.MustCompile("`" + m[1] + `[{\x60]`).Match(documented) {
			t.Errorf("docs/metrics.md does not name %s", m[1])
		}
	}
	s, err := control.Ask(ctx, l.path("run"))
	if err != nil || !s.Link.Up || s.Agent.Name != "renamed" || s.Sources[0].Name != "shop" || s.Audit.Sequence == 0 {
		t.Errorf("status %+v, %v", s, err)
	}
	if checks, err := control.AskCheck(ctx, l.path("run"), "shop"); err != nil || len(checks) < 3 {
		t.Errorf("check %v, %v", checks, err)
	}
	l.stop()
	want := "agent.register done, host.start done, sql.begin, sql.run done, sql.begin, sql.run denied, sql.run failed, sql.begin, sql.run failed, sql.begin, sql.run failed, source.check done, host.stop done"
	if got := l.actions(); got != want {
		t.Errorf("recorded\n%s, want\n%s", got, want)
	}
	raw, err := os.ReadFile(filepath.Join(audit.Dir(l.path("state")), "000001.jsonl"))
	if err != nil || bytes.Contains(raw, []byte(marked)) {
		t.Errorf("the audit log shows the password, or %v", err)
	}
	if _, err := control.Ask(context.Background(), l.path("run")); !errors.Is(err, control.ErrNotRunning) {
		t.Errorf("after the stop: %v", err)
	}
}

func TestDrain(t *testing.T) {
	_, source := database(t, "")
	c := newTestControl(t)
	l := newLab(t, c, source)
	l.start()
	up := c.awaitHello(1)
	// The first statement starts the parser, which can take longer than a drain may.
	if r := c.ask(t.Context(), up, "q0", "shop", "select 1"); r.err != nil {
		t.Fatal(r.err)
	}
	running := make(chan result, 1)
	go func() { running <- c.ask(context.Background(), up, "q1", "shop", "select pg_sleep(1)") }()
	awaitRunning(t, l.d, 1)
	l.cancel()
	poll(t, "the drain", l.d.stopping.Load)
	poll(t, "new statements to be refused", func() bool {
		return proto.CodeOf(c.ask(context.Background(), up, "q2", "shop", "select 1").err) == proto.CodeUnavailable
	})
	if r := <-running; r.err != nil {
		t.Errorf("the statement under way: %v", r.err)
	}
	l.stop()
}

func TestSecondSignalAborts(t *testing.T) {
	_, source := database(t, "")
	c := newTestControl(t)
	l := newLab(t, c, source)
	l.start()
	up := c.awaitHello(1)
	running := make(chan result, 1)
	go func() { running <- c.ask(context.Background(), up, "q1", "shop", "select pg_sleep(60)") }()
	awaitRunning(t, l.d, 1)
	l.cancel()
	poll(t, "the drain", l.d.stopping.Load)
	l.d.Abort()
	if r := <-running; proto.CodeOf(r.err) != proto.CodeUnavailable {
		t.Errorf("got %v", r.err)
	}
	l.stop()
	if got := l.actions(); !strings.Contains(got, "sql.run failed") || strings.Contains(got, "sql.lost") {
		t.Errorf("recorded %s", got)
	}
}

func TestReload(t *testing.T) {
	_, source := database(t, "")
	c := newTestControl(t)
	l := newLab(t, c, source)
	l.start()
	up := c.awaitHello(1)
	l.configure("sourcs: []\n")
	if err := l.d.Reload(); err == nil || !strings.Contains(err.Error(), "agentd.yaml:2: unknown key sourcs: did you mean sources?") {
		t.Errorf("a bad file: %v", err)
	}
	if r := c.ask(t.Context(), up, "q1", "shop", "select 1"); r.err != nil {
		t.Errorf("after a bad file: %v", r.err)
	}
	if s := l.d.status(); s.Config.Error == "" || len(s.Sources) != 1 {
		t.Errorf("status %+v", s.Config)
	}
	l.configure(strings.Replace(source, "name: shop", "name: store", 1) + "log: {level: warn}\n")
	if err := l.d.Reload(); err != nil {
		t.Fatal(err)
	}
	c.await("the new inventory", func() bool { return len(c.inventory) == 1 && c.inventory[0].Name == "store" })
	if r := c.ask(t.Context(), up, "q2", "shop", "select 1"); proto.CodeOf(r.err) != proto.CodeNotFound {
		t.Errorf("the old name: %v", r.err)
	}
	if r := c.ask(t.Context(), up, "q3", "store", "select 1"); r.err != nil {
		t.Errorf("the new name: %v", r.err)
	}
	if l.d.level.Level() != slog.LevelWarn || l.d.status().Config.Error != "" {
		t.Error("level or error not taken over")
	}
}

// TestHeadsAreCompared: the control plane's memory of our log is held against it.
func TestHeadsAreCompared(t *testing.T) {
	c := newTestControl(t)
	l := newLab(t, c, "")
	first := l.entries()[0]
	var hash [32]byte
	if _, err := hex.Decode(hash[:], []byte(first.Hash)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		head auditchain.Head
		want string
	}{
		{"nothing known", auditchain.Head{}, ""},
		{"the first entry", auditchain.Head{Sequence: 1, Hash: hash}, ""},
		{"another first entry", auditchain.Head{Sequence: 1, Hash: [32]byte{1}}, "rewritten"},
		{"more than there is", auditchain.Head{Sequence: 99, Hash: hash}, "removed from its end"},
	} {
		c.mu.Lock()
		c.known = tt.head
		n := len(c.hellos)
		c.mu.Unlock()
		l.start()
		c.awaitHello(n + 1)
		poll(t, "the link", func() bool { return l.d.link.State().Up })
		if got := l.d.status().Audit.Warning; (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q", tt.name, got)
		}
		l.stop()
	}
}

// TestLostStatement: what a killed agentd left open is closed in the log.
func TestLostStatement(t *testing.T) {
	c := newTestControl(t)
	l := newLab(t, c, "")
	log, _, err := audit.Open(l.path("state"), audit.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for _, action := range []string{audit.ActionStart, audit.ActionBegin} {
		if err := log.Append(t.Context(), auditchain.Entry{Action: action, QueryID: "q9", Statement: "select 1"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	l.start()
	l.stop()
	if got := l.actions(); !strings.Contains(got, "sql.begin, sql.lost failed, host.start done, host.stop done") {
		t.Errorf("recorded %s", got)
	}
}

func TestTamperedLogStopsTheDaemon(t *testing.T) {
	c := newTestControl(t)
	l := newLab(t, c, "")
	file := filepath.Join(audit.Dir(l.path("state")), "000001.jsonl")
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, bytes.Replace(raw, []byte("agent.register"), []byte("agent.nothing!"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	l.d = NewDaemon(slog.New(slog.DiscardHandler), new(slog.LevelVar))
	l.d.places.config, l.d.state, l.d.runtime = l.path("agentd.yaml"), l.path("state"), l.path("run")
	if err := l.d.Validate(); err != nil {
		t.Fatal(err)
	}
	if err := l.d.Run(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "tampered") {
		t.Errorf("got %v", err)
	}
}

func TestOneAgentdPerState(t *testing.T) {
	c := newTestControl(t)
	l := newLab(t, c, "")
	l.start()
	second := NewDaemon(slog.New(slog.DiscardHandler), new(slog.LevelVar))
	second.places.config, second.state, second.runtime = l.path("agentd.yaml"), l.path("state"), l.path("run2")
	if err := second.Validate(); err != nil {
		t.Fatal(err)
	}
	if err := second.Run(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "another agentd") {
		t.Errorf("got %v", err)
	}
	if _, err := control.Ask(t.Context(), l.path("run")); err != nil {
		t.Errorf("the first is gone: %v", err)
	}
}

func TestMetricsOnLoopback(t *testing.T) {
	c := newTestControl(t)
	for _, network := range []string{"tcp", "unix"} {
		listen := "unix:" + filepath.Join(t.TempDir(), "m.sock")
		if network == "tcp" {
			var err error
			if listen, err = freeport.Address(); err != nil {
				t.Fatal(err)
			}
		}
		c.mu.Lock()
		c.joined = false
		c.mu.Unlock()
		l := newLab(t, c, "metrics: {listen: '"+listen+"'}\n")
		l.start()
		transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, strings.TrimPrefix(listen, "unix:"))
		}}
		r, err := (&http.Client{Transport: transport}).Get("http://agentd/metrics")
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r.Body)
		r.Body.Close() //nolint:errcheck // read to its end
		if err != nil || !strings.Contains(string(text), "agentd_build_info") {
			t.Errorf("%s: %v", network, err)
		}
		l.stop()
	}
}

func TestRegisterRefusals(t *testing.T) {
	c, other := newTestControl(t), newTestControl(t)
	try := func(t *testing.T, url, keyFile string) error {
		t.Helper()
		state := filepath.Join(t.TempDir(), "state")
		r := &registerCommand{url: url, keyFile: keyFile, name: "x", out: io.Discard, errs: io.Discard, in: os.Stdin}
		r.config, r.state = "/nonexistent/agentd.yaml", state
		r.given = func(string) bool { return false }
		err := r.run(t.Context())
		if err != nil {
			if _, ierr := identity.Open(state); !errors.Is(ierr, identity.ErrNotRegistered) {
				t.Errorf("it left an identity: %v", ierr)
			}
			if strings.Contains(err.Error(), "prk1_") || strings.Contains(err.Error(), "\n") {
				t.Errorf("the error is %q", err)
			}
		}
		return err
	}
	garbled := filepath.Join(t.TempDir(), "garbled")
	if err := os.WriteFile(garbled, []byte(c.key.Encode()[:60]), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := try(t, c.web.URL, garbled); proto.CodeOf(err) != proto.CodeKeyMalformed {
		t.Errorf("garbled: %v", err)
	}
	if err := try(t, other.web.URL, c.keyFile(t)); proto.CodeOf(err) != proto.CodeWrongControlPlane || proto.ExitCode(err) != proto.ExitDenied {
		t.Errorf("wrong control plane: %v", err)
	}
	if err := try(t, "http://127.0.0.1:1", c.keyFile(t)); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("nothing listens: %v", err)
	}
	if err := try(t, c.web.URL, "/nonexistent/key"); err == nil || !strings.Contains(err.Error(), "/nonexistent/key") {
		t.Errorf("no key file: %v", err)
	}
	if err := try(t, c.web.URL, c.keyFile(t)); err != nil {
		t.Errorf("a good one: %v", err)
	}
	if err := try(t, c.web.URL, c.keyFile(t)); proto.CodeOf(err) != proto.CodeKeyUsedUp {
		t.Errorf("used up: %v", err)
	}
}
