package sqlsession_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/proto"
)

// relay stands where a database's address is, so that the server behind it can be
// another one, be cut off, or be slow (simulated: it pauses before each piece).
type relay struct {
	listener net.Listener
	target   atomic.Pointer[string]
	pause    atomic.Int64 // before each piece from the server, in nanoseconds
	cutAfter atomic.Int64 // bytes from the server until all is cut; 0: never
	wg       sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]bool
}

func newRelay(t *testing.T, s *pgserver.Server) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{listener: l, conns: make(map[net.Conn]bool)}
	r.lead(s)
	r.wg.Add(1)
	go func() {
		defer r.wg.Done()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r.wg.Add(1)
			go func() {
				defer r.wg.Done()
				r.serve(c)
			}()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		r.cut()
		r.wg.Wait()
	})
	return r
}

func (r *relay) lead(s *pgserver.Server) {
	address := fmt.Sprintf("127.0.0.1:%d", s.Port)
	r.target.Store(&address)
}

func (r *relay) port() int { return r.listener.Addr().(*net.TCPAddr).Port }

// cut ends all connections.
func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.conns {
		_ = c.Close()
	}
}

func (r *relay) keep(c net.Conn, is bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if is {
		r.conns[c] = true
	} else {
		delete(r.conns, c)
		_ = c.Close()
	}
}

func (r *relay) serve(c net.Conn) {
	r.keep(c, true)
	defer r.keep(c, false)
	server, err := net.Dial("tcp", *r.target.Load())
	if err != nil {
		return
	}
	r.keep(server, true)
	defer r.keep(server, false)
	r.wg.Add(1)
	go func() {
		defer r.wg.Done()
		_, _ = io.Copy(server, c)
		_ = server.Close()
	}()
	buf := make([]byte, 4096)
	for {
		n, err := server.Read(buf)
		if left := r.cutAfter.Load(); left > 0 && n > 0 && r.cutAfter.Add(-int64(n)) <= 0 {
			r.cut()
			return
		}
		time.Sleep(time.Duration(r.pause.Load()))
		if _, werr := c.Write(buf[:n]); err != nil || werr != nil {
			_ = c.Close()
			return
		}
	}
}

// behind is a source whose server is behind a relay.
func behind(r *relay) sqlsession.Source {
	s := source("db")
	s.DSN = fmt.Sprintf("host=127.0.0.1 port=%d user=reader dbname=%s sslmode=disable", r.port(), pgserver.Superuser)
	return s
}

// TestFailover: another server takes over the address; what ran ends in a clear
// error, and the same owner's next statement is on the new one.
func TestFailover(t *testing.T) {
	other := pgserver.Start(t)
	if err := other.CreateRole(t.Context(), "reader", readerPassword); err != nil {
		t.Fatal(err)
	}
	if err := other.SQL(t.Context(), "CREATE TABLE promoted (i int)", "GRANT SELECT ON promoted TO reader"); err != nil {
		t.Fatal(err)
	}
	r := newRelay(t, server)
	m := newManager(t, sqlsession.Config{}, behind(r))
	query(t, m, request("SELECT count(*) FROM things"))
	result := make(chan error, 1)
	go func() {
		_, err := m.Run(context.Background(), request("SELECT pg_sleep(60) /* fails over */"), io.Discard)
		result <- err
	}()
	eventually(t, "the statement to run", func() bool {
		return one(t, "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60) /* fails over */'") == "1"
	})
	r.lead(other)
	r.cut()
	if err := <-result; proto.CodeOf(err) != proto.CodeSourceUnreachable || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v, want SOURCE_UNREACHABLE in one line", err)
	}
	// Idle connections are dead, too: nobody needs to hear of that.
	query(t, m, request("SELECT * FROM promoted"))
	query(t, m, request("SELECT * FROM promoted"))
}

// TestCutInTheMiddle: the rows that came before the database went away are valid,
// and the error says what happened.
func TestCutInTheMiddle(t *testing.T) {
	r := newRelay(t, server)
	m := newManager(t, sqlsession.Config{Warm: -1}, behind(r))
	query(t, m, request("SELECT 1"))
	r.cutAfter.Store(8 << 20)
	var out bytes.Buffer
	outcome, err := m.Run(t.Context(), request("SELECT i, repeat('x', 1000) FROM generate_series(1, 1000000) i"), &out)
	if proto.CodeOf(err) != proto.CodeSourceUnreachable {
		t.Fatalf("got %v, want SOURCE_UNREACHABLE", err)
	}
	got := decode(t, out.Bytes())
	if outcome.Rows == 0 || uint64(len(got.rows)) != outcome.Rows || got.rows[len(got.rows)-1][0] != fmt.Sprint(len(got.rows)) {
		t.Errorf("got %d rows in the stream, the outcome says %d", len(got.rows), outcome.Rows)
	}
	query(t, m, request("SELECT 1"))
}

// TestSlowServer: a server that answers piece by piece takes its time and gives
// the same; over the limit it is a timeout, and the session goes on.
func TestSlowServer(t *testing.T) {
	defer sqlsession.SetKillAfter(300 * time.Millisecond)()
	r := newRelay(t, server)
	m := newManager(t, sqlsession.Config{Warm: -1}, behind(r))
	query(t, m, request("SELECT 1"))
	r.pause.Store(int64(5 * time.Millisecond))
	if got, _ := query(t, m, request("SELECT id, name FROM things ORDER BY id")); len(got.rows) != 1000 || got.rows[999][1] != "thing 1000" {
		t.Errorf("got %d rows", len(got.rows))
	}
	slow := request("SELECT repeat('x', 1000) FROM generate_series(1, 3000)")
	slow.Timeout = time.Second
	refuse(t, m, slow, proto.CodeTimeout)
	r.pause.Store(0)
	query(t, m, request("SELECT 1"))
}

// TestStoppedBackend: a backend that does not even notice the cancel request.
func TestStoppedBackend(t *testing.T) {
	defer sqlsession.SetKillAfter(300 * time.Millisecond)()
	m := newManager(t, sqlsession.Config{Warm: -1})
	got, _ := query(t, m, request("SELECT pg_backend_pid()"))
	pid, err := strconv.Atoi(got.rows[0][0])
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the session to be reset", func() bool {
		return one(t, "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle' AND query LIKE 'DISCARD%' AND pid = "+strconv.Itoa(pid)) == "1"
	})
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }()
	r := request("SELECT 1")
	r.Timeout = 300 * time.Millisecond
	refuse(t, m, r, proto.CodeTimeout)
	query(t, m, request("SELECT 1")) // in another session
}

// TestTooManyConnections: the server has no place, then it has one.
func TestTooManyConnections(t *testing.T) {
	createRole(t, "crowded", "marked-crowded-password", "CONNECTION LIMIT 1")
	s := source("db")
	s.DSN, s.Password = server.DSN("crowded", pgserver.Superuser), password("marked-crowded-password")
	m := newManager(t, sqlsession.Config{Warm: -1}, s)
	query(t, m, request("SELECT 1")) // tok_a's session has the place
	other := request("SELECT 1")
	other.Owner = "tok_b"
	var out bytes.Buffer
	_, err := m.Run(t.Context(), other, &out)
	if err == nil || !strings.Contains(err.Error(), "53300") && !strings.Contains(err.Error(), "too many connections") || strings.Contains(err.Error(), "marked") {
		t.Fatalf("got %v, want an error that says too many connections", err)
	}
	query(t, m, request("SELECT 1")) // whose place it is goes on
	if err := server.SQL(t.Context(), "ALTER ROLE crowded CONNECTION LIMIT 5"); err != nil {
		t.Fatal(err)
	}
	query(t, m, other)
}

// TestOneOwnersManyStatements: memory, descriptors and goroutines stay where they
// are, whatever becomes of the statements. 5,000 of them, 100,000 with
// POSTERN_LONG.
func TestOneOwnersManyStatements(t *testing.T) {
	statements := 5000
	if os.Getenv("POSTERN_LONG") != "" {
		statements = 100_000
	}
	// On a busy machine a reset takes longer than a statement waits: then there would be
	// more processes than one, rightly.
	defer sqlsession.SetResetWait(time.Minute)()
	m := newManager(t, sqlsession.Config{Warm: -1})
	var pid int
	resident := func() int {
		n, err := strconv.Atoi(strings.TrimSuffix(statusOf(t, pid)["VmRSS"], " kB"))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	descriptors := func(of string) int {
		entries, err := os.ReadDir("/proc/" + of + "/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	type sample struct{ resident, child, own, goroutines int }
	look := func() sample {
		return sample{resident(), descriptors(strconv.Itoa(pid)), descriptors("self"), runtime.NumGoroutine()}
	}
	var early sample
	var out bytes.Buffer
	for i := range statements {
		r, code := request(fmt.Sprintf("SELECT %d AS n, name FROM things WHERE id < 20 -- %s", i, strings.Repeat("x", i%300))), proto.Code(0)
		switch i % 10 {
		case 3:
			r.SQL, code = fmt.Sprintf("SELECT 1 / (%d - %d)", i, i), proto.CodeSQL
		case 5:
			r.SQL, code = fmt.Sprintf("SELECT nothing_%d", i), proto.CodeSQL
		case 7:
			r.SQL, code = "DELETE FROM things", proto.CodePolicyDenied
		case 9:
			r.MaxRows, code = 3, proto.CodeRowLimit
		}
		out.Reset()
		_, err := m.Run(t.Context(), r, &out)
		if proto.CodeOf(err) != code && (err != nil || code != 0) {
			t.Fatalf("statement %d: got %v, want code %v", i, err, code)
		}
		if pid == 0 {
			eventually(t, "one process", func() bool { return len(sessionProcesses(os.Getpid())) == 1 })
			pid = sessionProcesses(os.Getpid())[0]
		}
		if i == statements/5 {
			early = look()
		}
	}
	if now := sessionProcesses(os.Getpid()); len(now) != 1 || now[0] != pid {
		t.Fatalf("got processes %v, want %d alone", now, pid)
	}
	late := look()
	more := func() bool {
		return late.child > early.child+1 || late.own > early.own+4 || late.goroutines > early.goroutines+4
	}
	// The last statement's end may still be under way.
	for end := time.Now().Add(time.Minute); more() && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		late = look()
	}
	t.Logf("%d statements: after a fifth %+v, at the end %+v (KiB)", statements, early, late)
	slack := 8 << 10
	if raceEnabled {
		slack = 64 << 10
	}
	if late.resident > early.resident+slack {
		t.Errorf("the process grew from %d to %d KiB", early.resident, late.resident)
	}
	if more() {
		t.Errorf("something leaks: %+v became %+v", early, late)
	}
	if got := one(t, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader'"); got != "1" {
		t.Errorf("got %s connections, want 1", got)
	}
}
