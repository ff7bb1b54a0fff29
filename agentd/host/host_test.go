package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	gproto "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// fakeSQL runs what a test says.
type fakeSQL struct {
	run func(ctx context.Context, s Statement, w io.Writer) (*posternv1.QueryOutcome, error)
}

func (f fakeSQL) Run(ctx context.Context, s Statement, w io.Writer) (*posternv1.QueryOutcome, error) {
	return f.run(ctx, s, w)
}

func (f fakeSQL) Check(context.Context, string) []*posternv1.Check {
	return []*posternv1.Check{{Name: "reachable", Result: "ok"}}
}

func (f fakeSQL) Introspect(ctx context.Context, i Introspection, take func(*posternv1.CatalogPage) error) error {
	if i.Source == "open" && i.Timeout == time.Minute && len(i.Known) == 1 {
		return proto.Errorf(proto.CodeSourceUnreachable, "it is down")
	}
	if err := take(&posternv1.CatalogPage{Tables: []*posternv1.CatalogTable{{Schema: "s", Name: "t"}}}); err != nil {
		return err
	}
	return take(&posternv1.CatalogPage{Schemas: []*posternv1.CatalogSchema{{Name: "s"}}, Complete: true})
}

func (f fakeSQL) OpenSession(_ context.Context, o OpenSession) (*posternv1.SQLSession, error) {
	if o.Source == "full" {
		return nil, proto.Errorf(proto.CodeOverloaded, "no place")
	}
	return &posternv1.SQLSession{Id: o.ID, Source: o.Source, Principal: o.Principal}, nil
}

func (f fakeSQL) CloseSession(id, owner, reason string) error {
	if id != "s1" {
		return proto.Errorf(proto.CodeNotFound, "no session")
	}
	return nil
}
func (f fakeSQL) CloseSessions(owner, reason string) int { return 2 }
func (f fakeSQL) Sessions() []*posternv1.SQLSession      { return []*posternv1.SQLSession{{Id: "s1"}} }

func (f fakeSQL) Cancel(id string) bool              { return id == "q1" }
func (f fakeSQL) Running() []*posternv1.RunningQuery { return nil }

// fakeAudit keeps entries, unless it is told to fail.
type fakeAudit struct {
	mu      sync.Mutex
	entries []auditchain.Entry
	fail    error
}

func (f *fakeAudit) Append(_ context.Context, e auditchain.Entry) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return f.fail
	}
	f.entries = append(f.entries, e)
	return nil
}

func (f *fakeAudit) AppendSoon(ctx context.Context, e auditchain.Entry) error {
	return f.Append(ctx, e)
}

func (f *fakeAudit) Read(uint64, int) ([][]byte, error) { return [][]byte{[]byte("{}")}, nil }

func (f *fakeAudit) set(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = err
}

// actions is what was recorded, as "action outcome".
func (f *fakeAudit) actions() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for _, e := range f.entries {
		out = append(out, strings.TrimSpace(e.Action+" "+e.Outcome))
	}
	return strings.Join(out, ", ")
}

type bench struct {
	*Host
	audit *fakeAudit
	url   string
}

func newBench(t *testing.T, run func(context.Context, Statement, io.Writer) (*posternv1.QueryOutcome, error)) *bench {
	t.Helper()
	b := &bench{audit: &fakeAudit{}}
	b.Host = New(Config{
		SQL: fakeSQL{run}, Audit: b.audit, Wire: &fakeWire{},
		Decide: func(r *posternv1.SQLRequest) Verdict {
			switch r.Source {
			case "open":
				return Verdict{Known: true, Allowed: true, MaxRows: 5, MaxBytes: 6, Timeout: time.Minute, ReadWrite: true}
			case "closed":
				return Verdict{Known: true, Reason: "its mode forbids it"}
			}
			return Verdict{}
		},
		DecideIntrospection: func(source string) Verdict {
			return map[string]Verdict{"open": {Known: true, Allowed: true, Timeout: time.Minute}, "closed": {Known: true, Reason: "its mode forbids it"}}[source]
		},
		Sources: func() []*posternv1.SourceInfo { return []*posternv1.SourceInfo{{Name: "open"}, {Name: "closed"}} },
		Status:  func() *posternv1.HostStatusResponse { return &posternv1.HostStatusResponse{Software: "x"} },
		Agent:   func() (string, string) { return "agent", "org" },
	})
	s := httptest.NewServer(b.Host)
	t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		s.Close()
	})
	b.url = s.URL
	return b
}

var principal = &posternv1.Principal{Organization: "org", TokenId: "tok_1", TokenName: "ci", Role: "analyst"}

func (b *bench) post(t *testing.T, body []byte) (*http.Response, []byte) {
	t.Helper()
	r, err := http.Post(b.url+proto.SQLPath, "application/protobuf", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close() //nolint:errcheck // read to its end
	got, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r, got
}

func (b *bench) query(t *testing.T, change func(*posternv1.SQLRequest)) (rows string, o *posternv1.QueryOutcome, err error) {
	t.Helper()
	request := &posternv1.SQLRequest{QueryId: "q1", Source: "open", Sql: "select 1", Principal: principal}
	if change != nil {
		change(request)
	}
	body, merr := gproto.Marshal(request)
	if merr != nil {
		t.Fatal(merr)
	}
	r, got := b.post(t, body)
	if r.StatusCode != http.StatusOK {
		r.Body = io.NopCloser(bytes.NewReader(got))
		return "", nil, proto.ReadHTTPError(r)
	}
	o, derr := proto.DecodeOutcome(r.Trailer.Get(proto.OutcomeTrailer))
	if derr != nil {
		t.Fatal(derr)
	}
	if e := proto.FromDetail(o.Error); e != nil {
		err = e
	}
	return string(got), o, err
}

func ok(_ context.Context, s Statement, w io.Writer) (*posternv1.QueryOutcome, error) {
	_, err := io.WriteString(w, "rows")
	return &posternv1.QueryOutcome{Rows: 2, Bytes: 4, CommandTag: "SELECT 2"}, err
}

func TestStatement(t *testing.T) {
	var got Statement
	b := newBench(t, func(ctx context.Context, s Statement, w io.Writer) (*posternv1.QueryOutcome, error) {
		got = s
		return ok(ctx, s, w)
	})
	rows, o, err := b.query(t, func(r *posternv1.SQLRequest) {
		r.Parameters = []*posternv1.Parameter{{Name: "p", Value: gproto.String("v")}}
	})
	if err != nil || rows != "rows" || o.Rows != 2 || o.CommandTag != "SELECT 2" || o.QueryId != "q1" || o.Duration == nil {
		t.Errorf("%q, %v, %v", rows, o, err)
	}
	if got.SQL != "select 1" || got.MaxRows != 5 || got.MaxBytes != 6 || got.Timeout != time.Minute || !got.ReadWrite || got.Owner != `"org"/"tok_1"` || len(got.Parameters) != 1 {
		t.Errorf("ran %+v", got)
	}
	if b.audit.actions() != "sql.begin, sql.run done" {
		t.Errorf("recorded %s", b.audit.actions())
	}
	end := b.audit.entries[1]
	if end.Actor != "token ci" || end.Role != "analyst" || end.Source != "open" || end.Statement != "select 1" || end.Rows != 2 || end.Bytes != 4 ||
		end.Verdict != "allowed" || end.Agent != "agent" || end.Organization != "org" || end.QueryID != "q1" {
		t.Errorf("recorded %+v", end)
	}
}

func TestRefusals(t *testing.T) {
	never := func(context.Context, Statement, io.Writer) (*posternv1.QueryOutcome, error) {
		t.Error("it ran")
		return nil, nil
	}
	for _, tt := range []struct {
		name   string
		change func(*posternv1.SQLRequest)
		want   proto.Code
		record string
	}{
		{"policy", func(r *posternv1.SQLRequest) { r.Source = "closed" }, proto.CodePolicyDenied, "sql.run denied"},
		{"unknown source", func(r *posternv1.SQLRequest) { r.Source = "x" }, proto.CodeNotFound, "sql.run failed"},
		{"no source", func(r *posternv1.SQLRequest) { r.Source = "" }, proto.CodeInvalid, ""},
		{"no statement", func(r *posternv1.SQLRequest) { r.Sql = " \n" }, proto.CodeInvalid, ""},
		{"no id", func(r *posternv1.SQLRequest) { r.QueryId = "" }, proto.CodeInvalid, ""},
		{"strange id", func(r *posternv1.SQLRequest) { r.QueryId = "a b" }, proto.CodeInvalid, ""},
		{"many parameters", func(r *posternv1.SQLRequest) { r.Parameters = make([]*posternv1.Parameter, 1001) }, proto.CodeInvalid, ""},
		{"strange timeout", func(r *posternv1.SQLRequest) { r.Timeout = &durationpb.Duration{Seconds: 1 << 60} }, proto.CodeInvalid, ""},
		{"too large", func(r *posternv1.SQLRequest) { r.Sql = strings.Repeat("x", proto.MaxSQLRequest) }, proto.CodeBodyTooLarge, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, never)
			_, _, err := b.query(t, tt.change)
			if proto.CodeOf(err) != tt.want || b.audit.actions() != tt.record {
				t.Errorf("got %v (%v), recorded %q", proto.CodeOf(err), err, b.audit.actions())
			}
		})
	}
	t.Run("garbage", func(t *testing.T) {
		b := newBench(t, never)
		r, _ := b.post(t, []byte("\xff\xff\xff garbage"))
		if r.StatusCode != http.StatusBadRequest {
			t.Errorf("status %d", r.StatusCode)
		}
	})
	t.Run("other path", func(t *testing.T) {
		b := newBench(t, never)
		r, err := http.Get(b.url + "/etc/passwd")
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close() //nolint:errcheck // only the status counts
		if proto.CodeOf(proto.ReadHTTPError(r)) != proto.CodeNotFound {
			t.Errorf("status %d", r.StatusCode)
		}
	})
}

func TestErrors(t *testing.T) {
	for _, tt := range []struct {
		name   string
		before bool // the first byte
		err    error
		want   proto.Code
		record string
	}{
		{"sql error before", true, &proto.Error{Code: proto.CodeSQL, Message: "m", SQL: &posternv1.SQLErrorDetail{Sqlstate: "42P01"}}, proto.CodeSQL, "failed"},
		{"denied by class", true, proto.Errorf(proto.CodePolicyDenied, "CREATE is refused"), proto.CodePolicyDenied, "denied"},
		{"limit after", false, proto.Errorf(proto.CodeRowLimit, "m"), proto.CodeRowLimit, "failed"},
		{"cancelled", false, context.Canceled, proto.CodeCancelled, "cancelled"},
		{"private", true, errors.New("hunter2"), proto.CodeInternal, "failed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, func(_ context.Context, _ Statement, w io.Writer) (*posternv1.QueryOutcome, error) {
				o := &posternv1.QueryOutcome{}
				if !tt.before {
					io.WriteString(w, "rows") //nolint:errcheck // a test's
					o.Rows = 1
				}
				return o, tt.err
			})
			rows, _, err := b.query(t, nil)
			if proto.CodeOf(err) != tt.want || (rows == "rows") == tt.before || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%q, %v", rows, err)
			}
			if want := "sql.begin, sql.run " + tt.record; b.audit.actions() != want {
				t.Errorf("recorded %q, want %q", b.audit.actions(), want)
			}
			if e := b.audit.entries[1]; strings.Contains(e.Error, "hunter2") || (e.Verdict == "denied") != (tt.record == "denied") {
				t.Errorf("recorded %+v", e)
			}
		})
	}
}

// TestFullDisk: without an entry nothing runs, and an end that could not be
// written holds up what comes next until it is.
func TestFullDisk(t *testing.T) {
	full := proto.Errorf(proto.CodeStorageFull, "no space is left")
	ran := 0
	var b *bench
	b = newBench(t, func(ctx context.Context, s Statement, w io.Writer) (*posternv1.QueryOutcome, error) {
		ran++
		if ran == 1 {
			b.audit.set(full)
		}
		return ok(ctx, s, w)
	})
	if _, o, err := b.query(t, nil); err != nil || o.Rows != 2 {
		t.Errorf("the statement under way: %v, %v", o, err)
	}
	if _, _, err := b.query(t, nil); proto.CodeOf(err) != proto.CodeStorageFull || ran != 1 {
		t.Errorf("the next: %v, ran %d", err, ran)
	}
	b.audit.set(nil)
	if _, _, err := b.query(t, nil); err != nil {
		t.Errorf("with space again: %v", err)
	}
	if got := b.audit.actions(); got != "sql.begin, sql.run done, sql.begin, sql.run done" {
		t.Errorf("recorded %s", got)
	}
	b.audit.set(full)
	if _, _, err := b.query(t, nil); proto.CodeOf(err) != proto.CodeStorageFull || ran != 2 {
		t.Errorf("full before the beginning: %v, ran %d", err, ran)
	}
}

func TestHangUpCancels(t *testing.T) {
	began, ended := make(chan struct{}), make(chan error, 1)
	b := newBench(t, func(ctx context.Context, _ Statement, w io.Writer) (*posternv1.QueryOutcome, error) {
		io.WriteString(w, "rows") //nolint:errcheck // a test's
		close(began)
		<-ctx.Done()
		ended <- context.Cause(ctx)
		return &posternv1.QueryOutcome{Rows: 1}, ctx.Err()
	})
	body, err := gproto.Marshal(&posternv1.SQLRequest{QueryId: "q1", Source: "open", Sql: "select 1"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, b.url+proto.SQLPath, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	<-began
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("cause %v", err)
	}
	response.Body.Close() //nolint:errcheck // hung up
	if err := b.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := b.audit.actions(); got != "sql.begin, sql.run cancelled" {
		t.Errorf("recorded %s", got)
	}
}

func TestDrainAndAbort(t *testing.T) {
	began := make(chan struct{})
	b := newBench(t, func(ctx context.Context, _ Statement, w io.Writer) (*posternv1.QueryOutcome, error) {
		io.WriteString(w, "rows") //nolint:errcheck // a test's
		close(began)
		<-ctx.Done()
		return &posternv1.QueryOutcome{Rows: 1}, ctx.Err()
	})
	result := make(chan error, 1)
	go func() {
		_, _, err := b.query(t, nil)
		result <- err
	}()
	<-began
	if _, _, err := b.query(t, nil); proto.CodeOf(err) != proto.CodeInvalid {
		t.Errorf("the same id twice: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := b.Drain(ctx); !errors.Is(err, context.Canceled) || b.Running() != 1 {
		t.Errorf("drained with a statement running: %v", err)
	}
	if _, _, err := b.query(t, func(r *posternv1.SQLRequest) { r.QueryId = "q2" }); proto.CodeOf(err) != proto.CodeUnavailable {
		t.Errorf("while draining: %v", err)
	}
	b.Abort()
	if err := <-result; proto.CodeOf(err) != proto.CodeUnavailable || !strings.Contains(err.Error(), "stopping") {
		t.Errorf("aborted: %v", err)
	}
	if err := b.Drain(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestPanicEndsTheRequestAlone(t *testing.T) {
	first := true
	b := newBench(t, func(ctx context.Context, s Statement, w io.Writer) (*posternv1.QueryOutcome, error) {
		if first {
			first = false
			panic("boom")
		}
		return ok(ctx, s, w)
	})
	if _, _, err := b.query(t, nil); proto.CodeOf(err) != proto.CodeInternal || strings.Contains(err.Error(), "boom") {
		t.Errorf("got %v", err)
	}
	if got := b.audit.actions(); got != "sql.begin, sql.run failed" {
		t.Errorf("recorded %s", got)
	}
	if _, _, err := b.query(t, nil); err != nil {
		t.Errorf("the next: %v", err)
	}
}

func TestRecover(t *testing.T) {
	b := newBench(t, nil)
	if err := b.Recover([]auditchain.Entry{{Action: "sql.begin", QueryID: "q9", Source: "open", Statement: "select 1", Actor: "token ci", Agent: "agent"}}); err != nil {
		t.Fatal(err)
	}
	if e := b.audit.entries[0]; e.Action != "sql.lost" || e.QueryID != "q9" || e.Statement != "select 1" || e.Outcome != "failed" || e.Error == "" {
		t.Errorf("recorded %+v", e)
	}
}

func TestRPC(t *testing.T) {
	b := newBench(t, nil)
	c := posternv1connect.NewHostServiceClient(http.DefaultClient, b.url)
	ctx := t.Context()
	if r, err := c.ListSources(ctx, connect.NewRequest(&posternv1.ListSourcesRequest{})); err != nil || len(r.Msg.Sources) != 2 {
		t.Errorf("sources %v, %v", r, err)
	}
	if r, err := c.HostStatus(ctx, connect.NewRequest(&posternv1.HostStatusRequest{})); err != nil || r.Msg.Software != "x" {
		t.Errorf("status %v, %v", r, err)
	}
	if r, err := c.ReadAudit(ctx, connect.NewRequest(&posternv1.ReadAuditRequest{})); err != nil || len(r.Msg.Entries) != 1 {
		t.Errorf("audit %v, %v", r, err)
	}
	if r, err := c.CheckSource(ctx, connect.NewRequest(&posternv1.CheckSourceRequest{Source: "open", Principal: principal})); err != nil || len(r.Msg.Checks) != 1 {
		t.Errorf("check %v, %v", r, err)
	}
	if _, err := c.CheckSource(ctx, connect.NewRequest(&posternv1.CheckSourceRequest{Source: "x"})); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("check of nothing: %v", err)
	}
	for id, want := range map[string]bool{"q1": true, "q2": false} {
		if r, err := c.CancelQuery(ctx, connect.NewRequest(&posternv1.CancelQueryRequest{QueryId: id, Principal: principal})); err != nil || r.Msg.Found != want {
			t.Errorf("cancel %s: %v, %v", id, r, err)
		}
	}
	if got := b.audit.actions(); got != "source.check done, query.cancel done" && !strings.Contains(got, "query.cancel done") {
		t.Errorf("recorded %s", got)
	}
}

func FuzzServeSQL(f *testing.F) {
	good, err := gproto.Marshal(&posternv1.SQLRequest{QueryId: "q1", Source: "open", Sql: "select 1", Principal: principal})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte("\x0a\xff"))
	h := New(Config{
		SQL: fakeSQL{ok}, Audit: &fakeAudit{fail: errors.New("never")},
		Decide: func(*posternv1.SQLRequest) Verdict { return Verdict{Known: true, Allowed: true} },
	})
	f.Fuzz(func(t *testing.T, body []byte) {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, proto.SQLPath, bytes.NewReader(body)))
		if w.Code == http.StatusOK {
			t.Fatal("it ran without an audit entry")
		}
	})
}

// TestReport: the rows that may be kept are reported beside the result's end, which
// does not wait for them; Drain does.
func TestReport(t *testing.T) {
	rows := &posternv1.KeptRows{First: 1, Arrow: []byte("rows")}
	keeps := func(_ context.Context, s Statement, w io.Writer) (*posternv1.QueryOutcome, error) {
		if _, err := w.Write([]byte("rows")); err != nil {
			return nil, err
		}
		if s.Kept != nil {
			if s.KeepFirst != 3 || s.KeepLast != 4 {
				t.Errorf("keep %d and %d", s.KeepFirst, s.KeepLast)
			}
			s.Kept(rows)
		}
		return &posternv1.QueryOutcome{Rows: 1}, nil
	}
	b := newBench(t, keeps)
	decide := b.cfg.Decide
	keep := 3
	b.cfg.Decide = func(r *posternv1.SQLRequest) Verdict {
		v := decide(r)
		if keep > 0 {
			v.KeepFirst, v.KeepLast = keep, keep+1
		}
		return v
	}
	reports := make(chan *posternv1.ReportRowsRequest, 1)
	release := make(chan error)
	b.cfg.Report = func(_ context.Context, r *posternv1.ReportRowsRequest) error {
		reports <- r
		return <-release
	}
	takes := func(r *posternv1.SQLRequest) { r.TakesRows = true }

	_, o, err := b.query(t, takes)
	if err != nil || !o.RowsReported {
		t.Fatalf("got %v, %v", o, err)
	}
	if r := <-reports; r.QueryId != "q1" || r.Rows != rows {
		t.Errorf("reported %v", r)
	}
	if b.Running() != 1 {
		t.Error("the report does not count as running")
	}
	release <- errors.New("lost") // the statement is as good

	for name, change := range map[string]func(*posternv1.SQLRequest){
		"a control plane that takes none": func(r *posternv1.SQLRequest) { r.QueryId = "q2" },
		"a policy that keeps none":        func(r *posternv1.SQLRequest) { r.QueryId, r.TakesRows, keep = "q3", true, 0 },
	} {
		if _, o, err := b.query(t, change); err != nil || o.RowsReported {
			t.Errorf("%s: got %v, %v", name, o, err)
		}
		keep = 3
	}

	if _, _, err := b.query(t, takes); err != nil {
		t.Fatal(err)
	}
	<-reports
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("now"))
	if err := b.Drain(ctx); err == nil {
		t.Error("drained with a report under way")
	}
	close(release)
	if err := b.Drain(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestReportsAreBounded: what is beyond the bound is not kept, and the statement is
// as good.
func TestReportsAreBounded(t *testing.T) {
	b := newBench(t, func(_ context.Context, s Statement, w io.Writer) (*posternv1.QueryOutcome, error) {
		s.Kept(&posternv1.KeptRows{})
		_, err := w.Write([]byte("rows"))
		return &posternv1.QueryOutcome{}, err
	})
	decide := b.cfg.Decide
	b.cfg.Decide = func(r *posternv1.SQLRequest) Verdict {
		v := decide(r)
		v.KeepFirst = 1
		return v
	}
	release := make(chan struct{})
	b.cfg.Report = func(context.Context, *posternv1.ReportRowsRequest) error { <-release; return nil }
	for i := range cap(b.reports) + 1 {
		_, o, err := b.query(t, func(r *posternv1.SQLRequest) { r.QueryId, r.TakesRows = fmt.Sprint("q", i), true })
		if err != nil || o.RowsReported != (i < cap(b.reports)) {
			t.Errorf("statement %d: got %v, %v", i, o, err)
		}
	}
	close(release)
	if err := b.Drain(t.Context()); err != nil {
		t.Error(err)
	}
}
