package main

import (
	"context"
	"database/sql"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	_ "modernc.org/sqlite"

	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

// TestKernelsAskForSQL runs statements from a notebook's cells on a real database,
// before and after agentd's restart, and looks for the credential in the kernel.
func TestKernelsAskForSQL(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for kernels' namespaces")
	}
	criutest.Path(t)
	pg, source := database(t, "    policy: {mode: read-only, max_rows: 1000, mask: [{columns: ['*.card'], with: redact}]}\n")
	if err := pg.SQLIn(t.Context(), "shop", "create table orders as select n, 'o' || n as name, '4111' as card from generate_series(1, 50) n", "grant select on orders to reader"); err != nil {
		t.Fatal(err)
	}
	c := newTestControl(t)
	const rest = "kernels: {specs: [python3], warm: 1, uid_base: 1981000000, sources: [shop, notes]}\n"
	source += "  - {name: notes, engine: sqlite, dsn: path=" + notesDatabase(t) + ", policy: {mode: read-only}}\n"
	l := newLab(t, c, source+rest)
	p := startProcess(t, l, unwatched)
	up := c.awaitHello(1)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	api := kernels(up)
	id := jupyter.NewID()
	if _, err := api.StartKernel(ctx, connect.NewRequest(&posternv1.StartKernelRequest{Id: id, Spec: "python3", Principal: ana})); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { endKernels(t, l.path("state/kernels")) }) // what a test that fails leaves
	var stream io.ReadWriteCloser
	attach := func() {
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
	attach()
	run("import postern; print(postern.sources())", "'name': 'shop'")
	run("least = 48; evil = \"'; drop table orders; --\"; names = ['o1', 'o50']", "")
	run("%%sql --source shop --to rows\nselect n, name, card from orders where n > {{least}} and name <> {{evil}} order by n", "rows: 2 rows")
	run("print(type(rows).__name__, rows.n.tolist(), rows.card.tolist())", "DataFrame [49, 50] ['***', '***']")
	run("print(postern.sql('select count(*) from orders where name in ({{names|list}})', source='shop').scalar())", `2\n`)
	run("try: postern.sql('delete from orders', source='shop')\nexcept postern.Error as e: print(e.code, e.position)", "POLICY_DENIED 1")
	run("try: postern.sql('select nix', source='shop')\nexcept postern.Error as e: print(e.sqlstate, e.position)", "42703 8")
	run("try: postern.sql('select generate_series(1, 2000)', source='shop')\nexcept postern.Error as e: print(e.code)", "ROW_LIMIT")
	// The same text asks for other values where [ ] is a name in quotes: `it's :evil`.
	run("print(postern.sql(\"select [it's :evil], 'x\\\\', :least from notes\", source='notes').rows)", `[('kept', 'x\\\\', 48)]`)
	// A statement under way stands in the way of a checkpoint, and is named.
	run("import threading; threading.Thread(target=lambda: postern.sql('select pg_sleep(600)', source='shop'), daemon=True).start()", "")
	statementInTheWay(t, ctx, up, id)
	// The credential is nowhere in the kernel's process.
	// The pattern does not hold the text itself.
	run(`
import re
needle, found = re.compile(b'[`+marked[:1]+`]`+marked[1:]+`'), 0
for line in open('/proc/self/maps'):
    span, mode = line.split()[:2]
    if mode[0] != 'r' or 'vvar' in line or 'vsyscall' in line: continue
    a, b = (int(x, 16) for x in span.split('-'))
    with open('/proc/self/mem', 'rb', 0) as f:
        f.seek(a)
        try: text = f.read(b - a)
        except OSError: continue
    found += len(needle.findall(text))
print(f'found {found}')`, `found 0`)
	_ = stream.Close()
	p.signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	p = startProcess(t, l, unwatched)
	up = c.awaitHello(2)
	api = kernels(up)
	attach()
	defer stream.Close() //nolint:errcheck // it ends with the kernel
	run("print(postern.sql('select max(n) from orders where n > {{least}}', source='shop').scalar())", `50\n`)
	if _, err := api.StopKernel(ctx, connect.NewRequest(&posternv1.KernelRequest{Id: id, Principal: ana})); err != nil {
		t.Error(err)
	}
	p.signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	statements := 0
	for _, e := range l.entries() {
		if e.Action == "sql.run" {
			statements++
			if e.Remote != "kernel "+id || e.Actor != "token ana" {
				t.Errorf("the log has %+v", e)
			}
		}
	}
	if statements != 8 {
		t.Errorf("the log has %d statements, want 8", statements)
	}
}

// notesDatabase makes an SQLite database.
func notesDatabase(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notes.db")
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(t.Context(), "create table notes ([it's :evil] text); insert into notes values ('kept')"); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// statementInTheWay waits until the dry check names the statement that runs in a kernel, and
// cancels it.
func statementInTheWay(t *testing.T, ctx context.Context, up *tunnel.Tunnel, id string) {
	t.Helper()
	doer := &http.Client{Transport: up.Transport(tunnel.Control)}
	host := posternv1connect.NewHostServiceClient(doer, "http://agent")
	saved := posternv1connect.NewCheckpointHostServiceClient(doer, "http://agent")
	var said string
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		check, err := saved.CheckKernel(ctx, connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: id, Principal: ana}))
		if err != nil {
			t.Fatal(err)
		}
		if said = fmt.Sprint(check.Msg.Obstacles); strings.Contains(said, "a statement of %%sql or postern.sql that is under way") {
			break
		}
	}
	if !strings.Contains(said, "interrupt the cell") {
		t.Errorf("the dry check says %s", said)
	}
	_, err := saved.CheckpointKernel(ctx, connect.NewRequest(&posternv1.CheckpointKernelRequest{KernelId: id, Principal: ana}))
	if err == nil || !strings.Contains(err.Error(), "a statement of %%sql") {
		t.Errorf("a checkpoint in the midst of a statement: %v", err)
	}
	status, err := host.HostStatus(ctx, connect.NewRequest(&posternv1.HostStatusRequest{}))
	if err != nil || len(status.Msg.Queries) != 1 {
		t.Fatalf("the host runs %v, %v", status, err)
	}
	if _, err := host.CancelQuery(ctx, connect.NewRequest(&posternv1.CancelQueryRequest{QueryId: status.Msg.Queries[0].QueryId, Principal: ana})); err != nil {
		t.Error(err)
	}
}
