package report

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// memoryLog is a chain in memory.
type memoryLog struct {
	mu    sync.Mutex
	lines [][]byte
	head  auditchain.Head
	// retired is how many at the beginning are dropped.
	retired uint64
}

func (l *memoryLog) add(entries ...auditchain.Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range entries {
		e.Time = time.Now()
		l.head = e.Seal(l.head)
		l.lines = append(l.lines, e.Encode())
	}
}

func (l *memoryLog) Head() auditchain.Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head
}

func (l *memoryLog) Read(from uint64, limit int) ([][]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if from > uint64(len(l.lines)) {
		return nil, nil
	}
	page := l.lines[max(from-1, l.retired):]
	return slices.Clone(page[:min(limit, len(page))]), nil
}

// recorder is a control plane that may break before or after it has recorded.
type recorder struct {
	mu       sync.Mutex
	at       auditchain.Head
	told     []*posternv1.KernelStatement
	requests int
	before   func() error
	after    func() error
	changed  chan struct{}
}

func newRecorder() *recorder {
	return &recorder{before: func() error { return nil }, after: func() error { return nil }, changed: make(chan struct{}, 1)}
}

func (c *recorder) send(_ context.Context, m *posternv1.ReportStatementsRequest) (*posternv1.ReportStatementsResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := gproto.Size(m); n > 1<<20 || len(m.Statements) > 100 {
		return nil, proto.Errorf(proto.CodeInvalid, "%d bytes, %d statements", n, len(m.Statements))
	}
	c.requests++
	if m.Through.GetSequence() > 0 {
		if err := c.before(); err != nil {
			return nil, err
		}
		after, _ := auditchain.HeadFromProto(m.After)
		if after == c.at {
			c.at, _ = auditchain.HeadFromProto(m.Through)
			c.told = append(c.told, m.Statements...)
			select {
			case c.changed <- struct{}{}:
			default:
			}
		}
		if err := c.after(); err != nil {
			return nil, err
		}
	}
	return &posternv1.ReportStatementsResponse{Through: c.at.Proto()}, nil
}

func (c *recorder) ids() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var ids []string
	for _, s := range c.told {
		ids = append(ids, s.QueryId)
	}
	return ids
}

func run(id string) auditchain.Entry {
	return auditchain.Entry{Action: actionRun, Actor: "token ana", Role: "analyst", Target: "tok_ana", Source: "shop", QueryID: id, Remote: "kernel k1", Verdict: "allowed", Outcome: "done", Statement: "select 1", Rows: 3, Bytes: 40, DurationMillis: 1500}
}

func other() auditchain.Entry {
	return auditchain.Entry{Action: actionRun, Actor: "token ben", Source: "shop", QueryID: "qry_other", Verdict: "allowed", Outcome: "done"}
}

func TestStatementsAreTold(t *testing.T) {
	log, cp := &memoryLog{}, newRecorder()
	lost := run("qry_4")
	lost.Action, lost.Outcome, lost.Error = actionLost, "failed", "agentd died"
	denied := run("qry_3")
	denied.Verdict, denied.Outcome, denied.Error = "denied", "denied", "not you"
	failed := run("qry_2")
	failed.Outcome, failed.Error = "failed", "no table"
	log.add(other(), run("qry_1"), other(), failed, denied, lost, other())
	r := New(Config{Log: log, Send: cp.send})
	r.Began("qry_2")
	r.Ended("qry_2", &posternv1.ErrorDetail{Code: proto.CodeSQL, Message: "no table", Sql: &posternv1.SQLErrorDetail{Sqlstate: "42P01"}}, nil)
	r.Began("qry_1")
	r.Ended("qry_1", nil, &posternv1.KeptRows{First: 1, Arrow: []byte("rows")})
	if err := r.catchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(cp.ids(), " "); got != "qry_1 qry_2 qry_3 qry_4" {
		t.Fatalf("told %s", got)
	}
	one := cp.told[0]
	if one.KernelId != "k1" || one.Principal.TokenId != "tok_ana" || one.Principal.TokenName != "ana" || one.Principal.Role != "analyst" || one.Source != "shop" ||
		one.Sql != "select 1" || one.Verdict != "allowed" || one.State != "done" || one.Rows != 3 || one.Bytes != 40 || one.Duration.AsDuration() != 1500*time.Millisecond ||
		string(one.Kept.GetArrow()) != "rows" || one.Error != nil || time.Since(one.Ended.AsTime()) > time.Hour {
		t.Errorf("told %v", one)
	}
	for i, code := range []posternv1.ErrorCode{0, proto.CodeSQL, proto.CodePolicyDenied, proto.CodeSQLSessionDied} {
		if got := cp.told[i].GetError().GetCode(); got != code {
			t.Errorf("statement %d has the code %v, want %v", i+1, got, code)
		}
	}
	if len(r.details.all) != 0 || r.details.bytes != 0 {
		t.Errorf("%d details are left", len(r.details.all))
	}
	// Nothing new: nothing is told again, by this one or the next.
	for _, again := range []*Reporter{r, New(Config{Log: log, Send: cp.send})} {
		if err := again.catchUp(t.Context()); err != nil || len(cp.told) != 4 {
			t.Errorf("told %v, %v", cp.ids(), err)
		}
	}
}

// TestOnceHoweverItBreaks breaks every second report, before or after it was recorded,
// and starts anew with each.
func TestOnceHoweverItBreaks(t *testing.T) {
	log, cp := &memoryLog{}, newRecorder()
	rnd := rand.New(rand.NewPCG(1, 2))
	broken := proto.Errorf(proto.CodeAgentLost, "the tunnel broke")
	maybe := func() error {
		if rnd.IntN(3) == 0 {
			return broken
		}
		return nil
	}
	cp.before, cp.after = maybe, maybe
	var want []string
	failures := 0
	for i := range 400 {
		id := fmt.Sprintf("qry_%d", i)
		want = append(want, id)
		log.add(run(id), other())
		if rnd.IntN(5) == 0 {
			if New(Config{Log: log, Send: cp.send}).catchUp(t.Context()) != nil {
				failures++
			}
		}
	}
	cp.before, cp.after = func() error { return nil }, func() error { return nil }
	if err := New(Config{Log: log, Send: cp.send}).catchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(cp.ids(), want) {
		t.Errorf("told %d statements, want %d in their order", len(cp.told), len(want))
	}
	if failures < 10 {
		t.Errorf("only %d reports broke", failures)
	}
}

func TestReportsAreBounded(t *testing.T) {
	log, cp := &memoryLog{}, newRecorder()
	for i := range 250 {
		log.add(run(fmt.Sprintf("qry_%d", i)))
	}
	r := New(Config{Log: log, Send: cp.send})
	for i := range 40 { // a report can't have two
		r.Began(fmt.Sprintf("qry_%d", i))
		r.Ended(fmt.Sprintf("qry_%d", i), nil, &posternv1.KeptRows{Arrow: make([]byte, 600<<10)})
	}
	r.Began("qry_249")
	r.Ended("qry_249", nil, &posternv1.KeptRows{Arrow: make([]byte, 1<<20)}) // more than a report
	if err := r.catchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(cp.told) != 250 || cp.told[39].Kept == nil || cp.told[249].Kept != nil {
		t.Errorf("told %d statements", len(cp.told))
	}
	// The oldest details go first.
	for i := range 100 {
		r.Began(fmt.Sprintf("x%d", i))
		r.Ended(fmt.Sprintf("x%d", i), nil, &posternv1.KeptRows{Arrow: make([]byte, 1<<20)})
	}
	if r.details.bytes > detailBytes || r.details.all["x99"] == nil || r.details.all["x0"] != nil {
		t.Errorf("%d bytes are kept", r.details.bytes)
	}
	// Entries of others are not read again for ever.
	for range tellAnyway + 10 {
		log.add(other())
	}
	if err := r.catchUp(t.Context()); err != nil || cp.at != log.Head() {
		t.Errorf("told up to %d of %d, %v", cp.at.Sequence, log.Head().Sequence, err)
	}
}

func TestWhereItBegins(t *testing.T) {
	log, cp := &memoryLog{}, newRecorder()
	tell := func(want string) {
		t.Helper()
		if err := New(Config{Log: log, Send: cp.send}).catchUp(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(cp.ids(), " "); got != want {
			t.Errorf("told %s, want %s", got, want)
		}
	}
	// What was run for an earlier registration is not this one's.
	log.add(run("qry_before"), auditchain.Entry{Action: actionRegister}, run("qry_1"), run("qry_2"))
	tell("qry_1 qry_2")
	// A control plane that was restored gets again what it has forgotten.
	backup := cp.at
	log.add(run("qry_3"))
	tell("qry_1 qry_2 qry_3")
	cp.mu.Lock()
	cp.at, cp.told = backup, cp.told[:2]
	cp.mu.Unlock()
	tell("qry_1 qry_2 qry_3")
	// A log that was moved aside begins anew.
	*log = memoryLog{}
	tell("qry_1 qry_2 qry_3")
	log.add(run("qry_4"))
	tell("qry_1 qry_2 qry_3 qry_4")
}

// TestRetired: positions count by the entries' numbers, wherever the log begins.
func TestRetired(t *testing.T) {
	log, cp := &memoryLog{}, newRecorder()
	r := New(Config{Log: log, Send: cp.send})
	tell := func(r *Reporter, told uint64, want string) {
		t.Helper()
		if err := r.catchUp(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(cp.ids(), " "); got != want || r.Told() != told {
			t.Errorf("told %s up to %d, want %s up to %d", got, r.Told(), want, told)
		}
	}
	if r.Told() != 0 {
		t.Errorf("told up to %d", r.Told())
	}
	log.add(run("qry_1"), other(), auditchain.Entry{Action: actionRegister}, run("qry_2"), other(), other())
	tell(r, 6, "qry_2")
	r.Began("qry_3")
	log.add(other(), run("qry_3"), other())
	tell(r, 7, "qry_2") // it waits for the rest of the statement
	r.Ended("qry_3", nil, nil)
	tell(r, 9, "qry_2 qry_3")
	log.retired = 4
	log.add(run("qry_4"))
	tell(r, 10, "qry_2 qry_3 qry_4")
	log.retired = 10
	log.add(run("qry_5"))
	tell(New(Config{Log: log, Send: cp.send}), 11, "qry_2 qry_3 qry_4 qry_5") // the entry that the control plane knows was the last retired one
	// A control plane that was restored gets what is left of what it forgot.
	cp.mu.Lock()
	cp.at, cp.told = auditchain.Head{Sequence: 2}, nil
	cp.mu.Unlock()
	log.retired = 7
	again := New(Config{Log: log, Send: cp.send})
	tell(again, 11, "qry_3 qry_4 qry_5")
}

func TestRunWaitsForDetails(t *testing.T) {
	log, cp := &memoryLog{}, newRecorder()
	offline := true
	r := New(Config{Log: log, Send: func(ctx context.Context, m *posternv1.ReportStatementsRequest) (*posternv1.ReportStatementsResponse, error) {
		cp.mu.Lock()
		away := offline
		cp.mu.Unlock()
		if away {
			return nil, proto.Errorf(proto.CodeAgentOffline, "no link")
		}
		return cp.send(ctx, m)
	}})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { r.Run(ctx) })
	defer wg.Wait()
	defer cancel()
	r.Began("qry_1")
	log.add(run("qry_1"))
	r.Ended("qry_1", nil, nil)
	r.Began("qry_2")
	log.add(run("qry_2"))
	cp.mu.Lock()
	offline = false
	cp.mu.Unlock()
	r.Wake()
	<-cp.changed
	if got := cp.ids(); len(got) != 1 {
		t.Errorf("told %v before its details were there", got)
	}
	r.Ended("qry_2", nil, &posternv1.KeptRows{First: 1})
	<-cp.changed
	if got := cp.ids(); len(got) != 2 || cp.told[1].Kept == nil {
		t.Errorf("told %v", got)
	}
}
