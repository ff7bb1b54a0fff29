package e2e

import (
	"bytes"
	"context"
	"encoding/json"
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
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/e2e/stack"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/rowfmt"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

// held is a session that a token holds on host/db.
type held struct {
	t      *testing.T
	client *client.Client
	id     string
	source string
}

func hold(t *testing.T, c *client.Client, idle time.Duration) *held {
	t.Helper()
	return openOn(t, c, &posternv1.OpenSQLSessionRequest{Agent: "host", Source: "db"}, idle)
}

// holdOn is hold on another source of the host.
func holdOn(t *testing.T, c *client.Client, source string) *held {
	t.Helper()
	return openOn(t, c, &posternv1.OpenSQLSessionRequest{Agent: "host", Source: source}, 0)
}

func openOn(t *testing.T, c *client.Client, r *posternv1.OpenSQLSessionRequest, idle time.Duration) *held {
	t.Helper()
	if idle > 0 {
		r.IdleTimeout = durationpb.New(idle)
	}
	resp, err := c.Sessions.OpenSession(t.Context(), connect.NewRequest(r))
	if err != nil {
		t.Fatal(err)
	}
	return &held{t, c, resp.Msg.Session.Id, r.Source}
}

// run runs a statement and returns its rows as CSV without the header.
func (h *held) run(ctx context.Context, sql string) (string, *posternv1.QueryOutcome, error) {
	h.t.Helper()
	rows, err := h.client.SQL(ctx, "host", h.source, &posternv1.RunSQLRequest{Sql: sql, SessionId: h.id})
	if err != nil {
		return "", nil, err
	}
	defer rows.Close() //nolint:errcheck // read to its end
	var out bytes.Buffer
	err = rowfmt.Convert(ctx, &out, rows, rowfmt.CSV, rowfmt.Options{})
	if _, cerr := io.Copy(io.Discard, rows); cerr != nil {
		return "", nil, cerr
	}
	outcome, oerr := rows.Outcome()
	if oerr != nil {
		return "", outcome, oerr
	}
	if err != nil && !errors.Is(err, rowfmt.ErrNoSchema) {
		return "", outcome, err
	}
	_, text, _ := strings.Cut(out.String(), "\n")
	return strings.TrimSuffix(text, "\n"), outcome, nil
}

func (h *held) want(sql, rows, transaction string) {
	h.t.Helper()
	got, outcome, err := h.run(h.t.Context(), sql)
	if err != nil || got != rows || outcome.GetTransaction() != transaction {
		h.t.Fatalf("%s: got %q, transaction %q, %v; want %q and %q", sql, got, outcome.GetTransaction(), err, rows, transaction)
	}
}

func (h *held) fails(sql string, code proto.Code, says string) {
	h.t.Helper()
	_, _, err := h.run(h.t.Context(), sql)
	if proto.CodeOf(err) != code || !strings.Contains(err.Error(), says) {
		h.t.Fatalf("%s: got %v, want %v with %q", sql, err, code, says)
	}
}

// TestSessions holds sessions through everything that they must survive, and ends
// them by everything that must end them.
func TestSessions(t *testing.T) {
	pg := database(t, "sessions")
	s := newStack(t, stack.Options{})
	relay, err := tunneltest.NewRelay(s.Listen, tunneltest.RelayConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(relay.Close)
	policy := "      mode: read-write\n"
	config := func() string {
		return "sources:\n" + mustSource(t, s.Dir, "db", pg.SocketDSN("reader", "sessions"), policy)
	}
	agent, err := s.NewAgent("host", config())
	if err != nil {
		t.Fatal(err)
	}
	agent.URL = "http://" + relay.Addr()
	key, err := s.NewKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(agent.Register(t.Context(), key), agent.Start(), agent.Online(t.Context())); err != nil {
		t.Fatal(err)
	}
	admin := api(t, s)
	ana := tokenClient(t, s, "ana", "analyst")
	before := items(t, "sessions")

	// A transaction, temporary tables and settings, each session its own.
	a, b := hold(t, ana, 0), hold(t, ana, 0)
	a.want("create temp table scratch as select 42 as i", "", "none")
	a.want("set time zone 'Asia/Tokyo'", "", "none")
	a.want("begin", "", "open")
	a.want("update items set name = 'changed'", "", "open")
	b.fails("select * from scratch", proto.CodeSQL, "42P01")
	b.want("show timezone", pgZone(t), "none")
	a.fails("select oops", proto.CodeSQL, "position 8")
	a.fails("select 1", proto.CodeSQL, "25P02")
	a.want("rollback", "", "none")
	if got := items(t, "sessions"); got != before {
		t.Errorf("the table has changed: %s", got)
	}

	// Another token has none of it.
	other := &held{t, tokenClient(t, s, "bob", "analyst"), a.id, a.source}
	other.fails("select 1", proto.CodeNotFound, "no session")
	if _, err := other.client.Sessions.CloseSession(t.Context(), connect.NewRequest(&posternv1.CloseSQLSessionRequest{Agent: "host", SessionId: a.id})); proto.CodeOf(proto.FromConnect(err)) != proto.CodeNotFound {
		t.Errorf("another token closes it: got %v, want NOT_FOUND", err)
	}
	for c, want := range map[*client.Client]int{other.client: 0, ana: 2, admin: 2} {
		list, err := c.Sessions.ListSessions(t.Context(), connect.NewRequest(&posternv1.ListSQLSessionsRequest{}))
		if err != nil || len(list.Msg.Sessions) != want {
			t.Errorf("got %v, %v, want %d sessions", list, err, want)
		}
	}
	if text, err := agent.Run(t.Context(), "", "status", "--state", agent.StateDir(), "--runtime", agent.RuntimeDir()); err != nil || !strings.Contains(text, a.id) {
		t.Errorf("agentd status does not list the session: %v, %s", err, text)
	}

	// The history says which session a statement ran in.
	history, err := ana.Queries.ListQueries(t.Context(), connect.NewRequest(&posternv1.ListQueriesRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	in := map[string]int{}
	for _, q := range history.Msg.Queries {
		in[q.SessionId]++
	}
	if in[a.id] != 7 || in[b.id] != 2 {
		t.Errorf("the history has statements by session %v, want 7 of %s and 2 of %s", in, a.id, b.id)
	}

	// Hanging up ends the statement and not the session.
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(300*time.Millisecond, cancel)
	if _, _, err := a.run(ctx, "select pg_sleep(60) /* hang up */"); err == nil {
		t.Error("a statement that was given up ended well")
	}
	underWay(t, "/* hang up */", 0)
	a.again("select i from scratch", "42")

	// The tunnel goes, and comes back.
	relay.Cut()
	a.again("select i from scratch", "42")
	a.want("show timezone", "Asia/Tokyo", "none")

	// The control plane dies, and comes back; a transaction waits for it.
	a.want("begin", "", "open")
	s.ControlPlane.Kill()
	<-s.ControlPlane.Done()
	if err := s.StartControlPlane(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := agent.Online(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.again("select i from scratch", "42")
	a.want("commit", "", "none")

	// Idle ones end.
	c := hold(t, ana, time.Second)
	eventually(t, time.Minute, "the idle session has ended", func() error {
		list, err := ana.Sessions.ListSessions(t.Context(), connect.NewRequest(&posternv1.ListSQLSessionsRequest{}))
		if err != nil || len(list.Msg.Sessions) != 2 {
			return fmt.Errorf("%v, %v", list, err)
		}
		return nil
	})
	c.fails("select 1", proto.CodeNotFound, "it was idle for 1s")

	// A revoked token's sessions end, with what they had open, also when the tunnel
	// was away.
	carl := hold(t, tokenClient(t, s, "carl", "analyst"), 0)
	carl.want("begin", "", "open")
	carl.want("lock table items in share mode", "", "open")
	must(t, s, "token", "revoke", "carl")
	eventually(t, time.Minute, "the revoked token's session is gone from the host", func() error { return hosts(t, agent, 2) })
	dora := hold(t, tokenClient(t, s, "dora", "analyst"), 0)
	dora.want("begin", "", "open")
	relay.Silence()
	must(t, s, "token", "revoke", "dora")
	time.Sleep(time.Second)
	relay.Resume()
	relay.Cut()
	eventually(t, 40*time.Second, "the session is gone when the tunnel is back", func() error { return hosts(t, agent, 2) })

	// A change of policy ends the rest.
	policy = "      mode: read-only\n"
	agent.Config = config()
	if err := agent.WriteConfig(); err != nil {
		t.Fatal(err)
	}
	agent.Process.Signal(syscall.SIGHUP)
	eventually(t, time.Minute, "no session is left", func() error { return hosts(t, agent, 0) })
	if err := agent.Online(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.fails("select 1", proto.CodeNotFound, "the policy of its data source changed")

	opened, closed := map[string]int{}, map[string]int{}
	for _, e := range auditEntries(t, s, "host") {
		switch e.Action {
		case "session.open":
			opened[e.SessionID]++
		case "session.close":
			closed[e.SessionID]++
			if e.SessionID == carl.id && e.Error != "its token was revoked" {
				t.Errorf("the end of a revoked token's session: %+v", e)
			}
		case "sql.run":
			if e.SessionID == "" && strings.Contains(e.Statement, "scratch") {
				t.Errorf("a statement without its session: %+v", e)
			}
		}
	}
	if len(opened) != 5 || len(closed) != 5 || opened[a.id] != 1 || closed[a.id] != 1 {
		t.Errorf("the host's log has %v opened and %v closed, want 5 each", opened, closed)
	}
	atControl := 0
	for _, e := range auditEntries(t, s, "") {
		if e.SessionID == a.id {
			atControl++
		}
	}
	if atControl < 10 {
		t.Errorf("the control plane's log has %d entries of the session", atControl)
	}
	auditVerifies(t, s)
}

// again waits until the session answers: its last statement may be on its way out,
// and the tunnel on its way back.
func (h *held) again(sql, want string) {
	h.t.Helper()
	eventually(h.t, 30*time.Second, "the session goes on", func() error {
		got, _, err := h.run(h.t.Context(), sql)
		if err == nil && got != want {
			h.t.Fatalf("%s: got %q, want %q", sql, got, want)
		}
		if proto.CodeOf(err) == proto.CodeNotFound {
			h.t.Fatalf("%s: %v", sql, err)
		}
		return err
	})
}

// hosts checks how many sessions agentd says are open.
func hosts(t *testing.T, a *stack.Agent, want int) error {
	t.Helper()
	text, err := a.Run(t.Context(), "", "status", "-o", "json", "--state", a.StateDir(), "--runtime", a.RuntimeDir())
	if err != nil {
		return err
	}
	var status struct{ Sessions []struct{ ID string } }
	if err := json.Unmarshal([]byte(text), &status); err != nil {
		return err
	}
	if len(status.Sessions) != want {
		return fmt.Errorf("%d sessions are open, want %d", len(status.Sessions), want)
	}
	return nil
}

func pgZone(t *testing.T) string {
	t.Helper()
	conn, err := postgres(t).Connect(t.Context(), "sessions")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background()) //nolint:errcheck // a test's
	var zone string
	if err := conn.QueryRow(t.Context(), "show timezone").Scan(&zone); err != nil {
		t.Fatal(err)
	}
	return zone
}

// tokenClient is a client with a token of its own.
func tokenClient(t *testing.T, s *stack.Stack, name, role string) *client.Client {
	t.Helper()
	c, err := client.New(client.Config{URL: s.URL, Token: client.StaticToken(client.NewSecret(must(t, s, "token", "create", name, "--role", role)))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// TestShell runs a script through the shell, from the command line to the database.
func TestShell(t *testing.T) {
	pg := database(t, "shell")
	s := newStack(t, stack.Options{})
	if _, err := s.Join(t.Context(), "host", "sources:\n"+
		mustSource(t, s.Dir, "db", pg.SocketDSN("reader", "shell"), "      mode: read-write\n")+
		mustSource(t, s.Dir, "ro", pg.SocketDSN("reader", "shell"), "      plans: full\n")); err != nil {
		t.Fatal(err)
	}
	before := items(t, "shell")
	script := func(target, text string, args ...string) ended {
		cmd := s.Command(t.Context(), append([]string{"sql", "-i", target}, args...)...)
		cmd.Stdin = strings.NewReader(text)
		return finish(t, cmd)
	}
	e := script("host/db", `
create temp table t (id int, "odd name" text);
insert into t values (1, 'a;b'), (2, $$c;d$$);
begin isolation level repeatable read;
prepare q (int) as select * from t where id = $1;
execute q(2);
\set what a;b
select id from {{t|identifier}} where "odd name" in ({{l|list}}) or "odd name" = :what;
declare c cursor for select generate_series(1, 5);
fetch 2 c; commit;
\d items
`, "-f", "csv", "-p", "t=t", "-p", `l=[]`)
	want := "id,odd name\n2,c;d\nid\n1\ngenerate_series\n1\n2\n"
	if e.code != 0 || !strings.HasPrefix(e.stdout, want) || !strings.Contains(e.stdout, "primary key") {
		t.Errorf("exit %d: %s%s; want %s", e.code, e.stdout, e.stderr, want)
	}
	e = script("host/db", "begin;\nselect 1;\nselect oops\n, 2;\nselect 3;", "-f", "csv")
	if e.code != 1 || e.stdout != "?column?\n1\n" || !strings.Contains(e.stderr, "42703") || !strings.Contains(e.stderr, "LINE 1: select oops\n               ^") {
		t.Errorf("exit %d: %s%s", e.code, e.stdout, e.stderr)
	}
	e = script("host/ro", "begin;\nshow transaction_read_only;\ndelete from items;", "-f", "csv")
	if e.code != 3 || e.stdout != "transaction_read_only\non\n" || !strings.Contains(e.stderr, "read-only") {
		t.Errorf("exit %d: %s%s", e.code, e.stdout, e.stderr)
	}
	file := filepath.Join(t.TempDir(), "more.sql")
	if err := os.WriteFile(file, []byte("begin;\nupdate items set name = 'changed';"), 0o600); err != nil {
		t.Fatal(err)
	}
	e = script("host/db", `\i `+file)
	if e.code != 0 || !strings.Contains(e.stderr, "the transaction was not committed: it is rolled back") {
		t.Errorf("exit %d: %s%s", e.code, e.stdout, e.stderr)
	}
	if got := items(t, "shell"); got != before {
		t.Errorf("the table has changed: %s", got)
	}
	e = script("host/ro", "set enable_seqscan = off;\n\\explain select * from items where id = 5;\nselect 1;")
	if e.code != 0 || !strings.Contains(e.stdout, "Index") {
		t.Errorf("the plan, exit %d: %s%s", e.code, e.stdout, e.stderr)
	}
	// Ctrl-C ends a statement that has no row yet, in order.
	cmd := s.Command(t.Context(), "sql", "-i", "host/db")
	cmd.Stdin = strings.NewReader("begin; select pg_sleep(60) /* interrupted */;")
	ending := make(chan ended, 1)
	go func() { ending <- finish(t, cmd) }()
	underWay(t, "/* interrupted */", 1)
	cmd.Process.Signal(syscall.SIGINT) //nolint:errcheck // it runs
	if e := <-ending; e.code != 1 || !strings.Contains(e.stderr, "interrupted: the statement was cancelled") {
		t.Errorf("exit %d: %s%s", e.code, e.stdout, e.stderr)
	}
	sessions, err := api(t, s).Sessions.ListSessions(t.Context(), connect.NewRequest(&posternv1.ListSQLSessionsRequest{}))
	if err != nil || len(sessions.Msg.Sessions) != 0 {
		t.Errorf("got %v, %v, want no session left open", sessions, err)
	}
	script("host/nope", "select 1;").said(t, 4, "no data source")
}
