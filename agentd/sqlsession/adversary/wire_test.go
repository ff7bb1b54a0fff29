package adversary

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/wirestream"
)

// wireParts is into how many a corpus is cut for PostgreSQL's own protocol: a part
// of it runs, another one with ADVERSARY_PART, and all of it with POSTERN_LONG. With
// the race detector, which makes parsing twenty times slower, it is a smaller part.
const wireParts = 8 * raceFactor

// sample is what of a corpus runs this time.
func sample(all []attack) []attack {
	if os.Getenv("POSTERN_LONG") != "" {
		return all
	}
	part, _ := strconv.Atoi(os.Getenv("ADVERSARY_PART"))
	var some []attack
	for i, a := range all {
		if i%wireParts == part {
			some = append(some, a)
		}
	}
	return some
}

// wireWrites is what of the corpus of writes runs this time: all that is to run, since
// one needs what another made, and a sample of the rest.
func wireWrites(all []attack) []attack {
	sampled := map[int]bool{}
	for _, a := range sample(all) {
		sampled[a.line] = true
	}
	return slices.DeleteFunc(all, func(a attack) bool { return a.expect != runs && !sampled[a.line] })
}

// stranger is a client of PostgreSQL's own protocol that keeps all that it gets, and
// all that the logs get.
type stranger struct {
	t     *testing.T
	conn  net.Conn
	ended chan error
	wait  sync.WaitGroup
	near  net.Conn

	mu     sync.Mutex
	events []*posternv1.WireEvent
	told   []string // of the session itself
}

// Intend implements sqlsession.WireLog.
func (s *stranger) Intend(statements []*posternv1.WireEvent) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, statements...)
	return nil
}

// Event implements sqlsession.WireLog.
func (s *stranger) Event(e *posternv1.WireEvent) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, e)
	return nil
}

func connect(t *testing.T, m *sqlsession.Manager, source string) *stranger {
	t.Helper()
	var w *sqlsession.Wire
	var err error
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if w, err = m.OpenWire(t.Context(), sqlsession.WireRequest{SessionID: queryID(), Source: source}); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	s := &stranger{t: t, ended: make(chan error, 1)}
	near, far := net.Pipe()
	client, forClient := net.Pipe()
	s.conn, s.near = client, near
	go func() { s.ended <- w.Serve(far, s, func() { _ = far.Close() }) }()
	opened := make(chan struct{})
	s.wait.Go(func() {
		defer func() { _ = forClient.Close() }()
		in := wirestream.NewReader(near)
		for {
			kind, err := in.Next()
			if err != nil {
				return
			}
			switch kind {
			case wirestream.Data:
				if in.CopyData(forClient) != nil {
					_, _ = io.Copy(io.Discard, near)
					return
				}
			case wirestream.Opened:
				var first posternv1.WireOpened
				_ = in.Message(&first)
				close(opened)
			case wirestream.End:
				var end posternv1.WireEnd
				_ = in.Message(&end)
				s.mu.Lock()
				s.told = append(s.told, end.String())
				s.mu.Unlock()
			}
		}
	})
	s.wait.Go(func() {
		_ = wirestream.NewWriter(near).Pump(forClient, make([]byte, 64<<10))
		_ = near.Close()
	})
	select {
	case <-opened:
	case err := <-s.ended:
		t.Fatalf("a session ends at once: %v", err)
	}
	return s
}

// close ends the session and waits for its end.
func (s *stranger) close() {
	_ = s.conn.Close()
	select {
	case <-s.ended:
	case <-time.After(time.Minute):
		s.t.Error("a session does not end")
	}
	_ = s.near.Close()
	s.wait.Wait()
}

// heard is what came back of one cycle.
type heard struct {
	raw    []byte // all messages
	tags   []string
	states []string // SQLSTATEs
	errors []string // messages
	gone   bool
}

// say sends messages and reads on to ReadyForQuery.
func (s *stranger) say(messages ...pgproto3.FrontendMessage) heard {
	s.t.Helper()
	var out []byte
	for _, m := range messages {
		var err error
		if out, err = m.Encode(out); err != nil {
			s.t.Fatal(err)
		}
	}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = s.conn.Write(out)
	}()
	h := heard{}
	_ = s.conn.SetReadDeadline(time.Now().Add(2 * time.Minute))
	var head [5]byte
	for {
		if _, err := io.ReadFull(s.conn, head[:]); err != nil {
			h.gone = true
			if errors.Is(err, os.ErrDeadlineExceeded) {
				s.t.Error("no answer for two minutes")
			}
			_ = s.conn.Close()
			break
		}
		body := make([]byte, binary.BigEndian.Uint32(head[1:])-4)
		if _, err := io.ReadFull(s.conn, body); err != nil {
			h.gone = true
			break
		}
		h.raw = append(append(h.raw, head[:]...), body...)
		switch head[0] {
		case 'E':
			var e pgproto3.ErrorResponse
			if err := e.Decode(body); err != nil {
				s.t.Error(err)
			}
			h.states, h.errors = append(h.states, e.Code), append(h.errors, e.Message)
		case 'C':
			h.tags = append(h.tags, string(bytes.TrimRight(body, "\x00")))
		case 'G': // COPY FROM STDIN
			go func() { _, _ = s.conn.Write([]byte{'f', 0, 0, 0, 5, 0}) }() // CopyFail
		}
		if head[0] == 'Z' {
			break
		}
	}
	<-sent
	return h
}

// wireWays are how a statement is said in PostgreSQL's protocol.
var wireWays = []string{"simple", "extended", "in pieces, binary", "PREPARE", "cursor", "COPY", "EXPLAIN", "in a transaction"}

func isQuery(sql string) bool {
	first, _, _ := strings.Cut(strings.TrimLeft(sql, " (\t\n"), " ")
	return slices.Contains([]string{"select", "with", "values", "table", "insert", "update", "delete", "merge"}, strings.ToLower(first))
}

// through says a statement in one way; nil when it can't be said so.
func (s *stranger) through(way, sql string) []heard {
	text := func(sql string) heard { return s.say(&pgproto3.Query{String: sql}) }
	if i := slices.Index(wireWays, way); i > 2 && i < 7 && !isQuery(sql) {
		return nil
	}
	trimmed := strings.TrimRight(sql, "; \n\t")
	switch way {
	case "simple":
		return []heard{text(sql)}
	case "extended":
		return []heard{s.say(&pgproto3.Parse{Query: sql}, &pgproto3.Describe{ObjectType: 'S'}, &pgproto3.Bind{}, &pgproto3.Describe{ObjectType: 'P'}, &pgproto3.Execute{}, &pgproto3.Sync{})}
	case "in pieces, binary":
		one := s.say(&pgproto3.Parse{Name: "a", Query: sql}, &pgproto3.Bind{DestinationPortal: "p", PreparedStatement: "a", ResultFormatCodes: []int16{1}},
			&pgproto3.Execute{Portal: "p", MaxRows: 1}, &pgproto3.Execute{Portal: "p"}, &pgproto3.Sync{})
		return []heard{one, s.say(&pgproto3.Close{ObjectType: 'S', Name: "a"}, &pgproto3.Sync{})}
	case "PREPARE":
		return []heard{text("PREPARE attack AS " + trimmed), text("EXECUTE attack"), text("DEALLOCATE ALL")}
	case "cursor":
		return []heard{text("BEGIN; DECLARE attack CURSOR FOR " + trimmed), text("FETCH ALL FROM attack"), text("COMMIT")}
	case "COPY":
		return []heard{text("COPY (" + trimmed + ") TO STDOUT")}
	case "EXPLAIN":
		return []heard{text("EXPLAIN " + sql), text("EXPLAIN (ANALYZE, FORMAT JSON) " + sql)}
	case "in a transaction":
		return []heard{text("BEGIN"), text(sql), text("COMMIT")}
	}
	panic(way)
}

// said is what came of a statement, in all ways.
type said struct {
	text   string // all that came out, and the logs
	first  heard  // of the simple way
	second heard  // of the extended protocol
	denied bool   // the log has it refused, both times
}

// wireWarm is done once the parser has answered.
var wireWarm sync.Once

// shout says a statement in all ways to a session of its own.
func shout(t *testing.T, m *sqlsession.Manager, log *lockedBuffer, source, sql string) said {
	t.Helper()
	wireWarm.Do(func() { waitForParser(t, m, source) })
	if slices.ContainsFunc(endless, func(word string) bool { return strings.Contains(sql, word) }) {
		source += briefly
	}
	log.take()
	var out said
	var text strings.Builder
	s := connect(t, m, source)
	denials := 0
	for _, way := range wireWays {
		for i, h := range s.through(way, sql) {
			fmt.Fprintf(&text, "\n-- %s %d: %v %v\n%s", way, i, h.states, h.tags, h.raw)
			switch way {
			case "simple":
				out.first = h
			case "extended":
				out.second = h
			}
			if h.gone {
				s.close()
				text.WriteString(s.log(way, &denials))
				s = connect(t, m, source)
				break
			}
		}
		if h := s.say(&pgproto3.Query{String: "ROLLBACK"}); h.gone {
			s.close()
			text.WriteString(s.log(way, &denials))
			s = connect(t, m, source)
		}
		text.WriteString(s.log(way, &denials))
	}
	s.close()
	text.WriteString(s.log("", &denials) + "\n" + log.take())
	out.text, out.denied = text.String(), denials >= 2
	return out
}

// log is what the host's log was told, but for what differs from run to run.
func (s *stranger) log(way string, denials *int) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var text strings.Builder
	text.WriteByte('\n')
	for _, e := range s.events {
		if e.Verdict == "denied" && (way == "simple" || way == "extended") {
			*denials++
		}
		if e.State == posternv1.WireEvent_STATE_RUNNING {
			continue // of what took longer than a moment
		}
		fmt.Fprintln(&text, e.State, e.Sql, e.Verdict, e.CommandTag, e.Error)
	}
	for _, line := range s.told {
		text.WriteString(line + "\n")
	}
	s.events, s.told = nil, nil
	return text.String()
}

// briefly is the end of the name of a source with a short time limit.
const briefly = "_briefly"

// wireManager has each source twice, the second one with a short time limit.
func wireManager(t *testing.T, sources ...sqlsession.Source) (*sqlsession.Manager, *lockedBuffer) {
	t.Helper()
	for _, s := range slices.Clone(sources) {
		s.StatementTimeout = time.Second
		s.Name += briefly
		sources = append(sources, s)
	}
	return newManager(t, sources...)
}

// fine are attacks that this protocol lets through, each for a reason.
var fine = map[string]string{
	"nothing at all":                 "an empty query is none, here as in PostgreSQL",
	"a comment alone":                "an empty query is none, here as in PostgreSQL",
	"unlocking all":                  "pools end with it: it gives up what the session alone can hold",
	"set_config for the transaction": "it is SET LOCAL, and the host's own limit of time holds whatever it says",
}

// unsteady are attacks whose answers differ between the worlds for another reason.
var unsteady = map[string]string{
	"statistics underneath": "in binary the result ends at the first array that has no binary form, and where that is in pg_statistic depends on when it was analyzed",
	"a partition's bound":   "each world has made the table by itself, and RowDescription has its OID",
}

// verb tells whether a statement is one that this protocol has, and a single
// statement elsewhere has not.
func verb(sql string) bool {
	first, _, _ := strings.Cut(strings.ToLower(strings.TrimSpace(sql)), " ")
	return slices.Contains([]string{
		"begin", "begin;", "start", "commit", "commit;", "rollback", "rollback;", "end", "abort", "savepoint", "release", "set", "reset", "discard", "prepare", "execute",
		"deallocate", "declare", "fetch", "move", "close", "copy", "lock", "listen", "unlisten", "notify", "explain",
	}, first)
}

// judgeWire holds what was said against the expectation.
func (a attack) judgeWire(sql string, got said) (problems []string) {
	if fine[a.why] != "" {
		a.expect = harmless
	}
	for way, h := range map[string]heard{"simple": got.first, "extended": got.second} {
		for _, message := range h.errors {
			if strings.Contains(message, "\n") {
				problems = append(problems, way+": the error has more than one line")
			}
		}
		failed := h.gone || len(h.states) > 0
		switch a.expect {
		case refused, fails:
			if !failed && !verb(sql) {
				problems = append(problems, way+": it ran")
			}
		case runs:
			if failed {
				problems = append(problems, way+": it does not run: "+strings.Join(h.errors, "; "))
			}
		}
	}
	if a.expect == refused && !got.denied && !verb(sql) {
		problems = append(problems, fmt.Sprintf("it was not refused but failed: %v %v", got.first.errors, got.second.errors))
	}
	return problems
}

// TestWireReadOnly is TestReadOnly through PostgreSQL's own protocol.
func TestWireReadOnly(t *testing.T) {
	w := sharedWorld(t)
	m, log := wireManager(t,
		w.source(roleRoot, roleRoot, alpha, sqlsession.Guard{Mode: "read-only"}),
		w.source(roleShadow, roleShadow, alpha, sqlsession.Guard{Mode: "read-only"}))
	r := newReport(t, "wire-readonly")
	defer r.end()
	attacks := sample(append(corpus(t, "testdata/readonly.sql"), generated()...))
	for _, source := range []string{roleRoot, roleShadow} {
		before, err := w.snapshot(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range attacks {
			shadowed := strings.HasPrefix(a.why, "[shadow] ")
			if source == roleShadow && a.expect != refused && !shadowed || source == roleRoot && shadowed {
				continue
			}
			sql := w.fill(a.sql, alpha)
			problems := a.judgeWire(sql, shout(t, m, log, source, sql))
			more, after := w.settle(t, before)
			before = after
			if source == roleShadow && !shadowed {
				a.why = "[shadow] " + a.why
			}
			r.add(a, append(problems, more...))
		}
	}
}

// settle is what an attack has changed, and the state to go on from.
func (w *world) settle(t *testing.T, before state) (problems []string, after state) {
	t.Helper()
	found, after, err := w.changed(t.Context(), before)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		problems = append(problems, "changed: "+f)
	}
	if len(found) > 0 {
		w.repair(t, found)
		if after, err = w.snapshot(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
	}
	return problems, after
}

// wireTelling is telling through PostgreSQL's own protocol.
type wireTelling struct {
	t    *testing.T
	w    *world
	m    *sqlsession.Manager
	log  *lockedBuffer
	same bool
}

func (x *wireTelling) ask(a attack) (problems []string) {
	x.t.Helper()
	sqlAlpha, sqlBeta := x.w.fill(a.sql, alpha), x.w.fill(a.sql, beta)
	got := shout(x.t, x.m, x.log, alpha, sqlAlpha)
	other := shout(x.t, x.m, x.log, beta, sqlBeta)
	problems = a.judgeWire(sqlAlpha, got)
	if one, two := got.text, other.text; x.same && unsteady[a.why] == "" && sqlAlpha == sqlBeta && timeless(one) != timeless(two) {
		problems = append(problems, "it tells the worlds apart: "+strings.ToValidUTF8(clip(delta(one, two)), "?"))
	}
	if spilled(sqlAlpha) == "" {
		if form := spilled(got.text); form != "" {
			problems = append(problems, "a canary came out: "+around(got.text, form))
		}
	}
	return problems
}

// timeless leaves out how long things took, which agentd's log says.
func timeless(text string) string {
	lines := strings.Split(text, "\n")
	return strings.Join(slices.DeleteFunc(lines, func(l string) bool { return strings.HasPrefix(l, "time=") }), "\n")
}

// TestWireMetadata is TestMetadata through PostgreSQL's own protocol, with plans.
func TestWireMetadata(t *testing.T) {
	w := sharedWorld(t)
	for _, plans := range []string{"off", "structure"} {
		t.Run("plans "+plans, func(t *testing.T) {
			guard := sqlsession.Guard{Mode: "metadata", Plans: plans}
			m, log := wireManager(t, w.source(alpha, roleRoot, alpha, guard), w.source(beta, roleRoot, beta, guard))
			r := newReport(t, "wire-metadata-"+plans)
			defer r.end()
			before, err := w.snapshot(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			x := &wireTelling{t: t, w: w, m: m, log: log, same: true}
			attacks := corpus(t, "testdata/metadata.sql")
			for _, a := range append(corpus(t, "testdata/readonly.sql"), generated()...) {
				a.expect, a.why = harmless, "[read-only] "+a.why
				attacks = append(attacks, a)
			}
			for _, a := range sample(attacks) {
				if a.expect == runs {
					a.expect = harmless // what only describes does not run here
				}
				problems := x.ask(a)
				more, after := w.settle(t, before)
				before = after
				r.add(a, append(problems, more...))
			}
		})
	}
}

// TestWireMasking is TestMasking through PostgreSQL's own protocol, with plans.
func TestWireMasking(t *testing.T) {
	w := ownWorld(t)
	tell := func(same bool, filters, plans string, with ...string) map[bool]*wireTelling {
		all := make(map[bool]*wireTelling)
		for _, readWrite := range []bool{false, true} {
			mode := "read-only"
			if readWrite {
				mode = "read-write"
			}
			guard := maskGuard(mode, filters, with...)
			guard.Plans = plans
			m, log := wireManager(t, w.source(alpha, roleRoot, alpha, guard), w.source(beta, roleRoot, beta, guard))
			all[readWrite] = &wireTelling{t: t, w: w, m: m, log: log, same: same}
		}
		return all
	}
	strict := tell(true, "refuse", "structure", "redact", "null")
	loose := tell(false, "equality", "analyze", "hash", "partial", "noise")
	r := newReport(t, "wire-masking")
	defer r.end()
	before, err := w.snapshot(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range sample(corpus(t, "testdata/masking.sql")) {
		readWrite := strings.HasPrefix(a.why, "[rw] ")
		problems := strict[readWrite].ask(a)
		for _, p := range loose[readWrite].ask(a) {
			problems = append(problems, "with hash, partial and noise: "+p)
		}
		found, after, err := w.changed(t.Context(), before)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			if a.expect == refused {
				problems = append(problems, "changed: "+f)
			}
		}
		before = after
		r.add(a, problems)
	}
}

// TestWireReadWrite is TestReadWrite through PostgreSQL's own protocol.
func TestWireReadWrite(t *testing.T) {
	w := ownWorld(t)
	limited := sqlsession.Guard{Mode: "read-write", WriteSchemas: []string{"app"}, WriteStatements: []string{"insert", "update", "delete", "merge"}}
	ddl := sqlsession.Guard{Mode: "read-write", WriteSchemas: []string{"app"}, WriteStatements: []string{"insert", "update", "delete", "merge", "truncate", "ddl", "call"}}
	m, log := wireManager(t, w.source("limited", roleRoot, alpha, limited), w.source("ddl", roleRoot, alpha, ddl))
	r := newReport(t, "wire-readwrite")
	defer r.end()
	before, err := w.snapshot(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range wireWrites(corpus(t, "testdata/readwrite.sql")) {
		source := "limited"
		isDDL := strings.HasPrefix(a.why, "[ddl] ")
		if isDDL {
			source = "ddl"
		}
		sql := w.fill(a.sql, alpha)
		got := shout(t, m, log, source, sql)
		if a.expect == runs { // it runs once: the second time it meets what the first left
			got.second = heard{}
		}
		problems := a.judgeWire(sql, got)
		found, after, err := w.changed(t.Context(), before)
		if err != nil {
			t.Fatalf("after %s: %v", clip(a.sql), err)
		}
		for _, f := range found {
			if a.expect == runs && allowed(f, isDDL) || a.expect == fails && (strings.HasPrefix(f, "next xid:") || strings.HasPrefix(f, "wal:")) {
				continue
			}
			problems = append(problems, "changed: "+f)
		}
		if len(found) > 0 {
			w.repair(t, found)
			if err := w.prepareState(t.Context()); err != nil {
				t.Fatal(err)
			}
			if after, err = w.snapshot(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
		}
		before = after
		r.add(a, problems)
	}
}
