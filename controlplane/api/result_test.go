package api

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/resultstream"
)

// analysts knows one token, of an analyst.
type analysts struct{ Tokens }

func (analysts) Authenticate(context.Context, string, string) (Caller, error) {
	return Caller{Principal: &posternv1.Principal{Organization: "org_1", TokenId: "tok_1", TokenName: "ann", Role: "analyst"}}, nil
}

type unlimited struct{}

func (unlimited) Allow(string) bool { return true }

// slowQueries takes its time before the first row and after it.
type slowQueries struct {
	Queries
	before, after time.Duration
	refuse        error // what Start says
	outcome       *posternv1.QueryOutcome
}

func (q slowQueries) Start(ctx context.Context, _ Caller, _, _ string, _ *posternv1.RunSQLRequest) (Result, error) {
	if err := wait(ctx, q.before); err != nil {
		return nil, err
	}
	if q.refuse != nil {
		return nil, q.refuse
	}
	return &slowResult{ctx: ctx, queries: q}, nil
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

type slowResult struct {
	ctx     context.Context
	queries slowQueries
	read    int
}

func (r *slowResult) QueryID() string { return "qry_1" }

func (r *slowResult) Read(p []byte) (int, error) {
	r.read++
	if r.read == 1 {
		return copy(p, "rows"), nil
	}
	if err := wait(r.ctx, r.queries.after); err != nil {
		return 0, err
	}
	return 0, io.EOF
}

func (r *slowResult) Finish(broke error) *posternv1.QueryOutcome {
	if broke != nil {
		return &posternv1.QueryOutcome{Error: proto.Detail(broke)}
	}
	return r.queries.outcome
}

// ask posts a statement to an API with these queries and a sign of life every
// 20 ms, and returns status, header and body.
func ask(t *testing.T, q Queries, accept string) (*http.Response, []byte) {
	t.Helper()
	a := New(Config{
		Tokens: analysts{}, Queries: q, Gatherer: prometheus.NewRegistry(), Tunnel: http.NotFoundHandler(), Jupyter: http.NotFoundHandler(), DAV: http.NotFoundHandler(), SignOfLife: 20 * time.Millisecond, Requests: unlimited{},
	})
	server := httptest.NewServer(a)
	t.Cleanup(server.Close)
	req, err := http.NewRequest(http.MethodPost, server.URL+"/api/v1/sql/host/db", strings.NewReader(`{"sql":"select 1"}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer x")
	req.Header.Set("Accept", accept)
	resp, err := server.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, body
}

func TestResultStream(t *testing.T) {
	const silence = 200 * time.Millisecond
	done := &posternv1.QueryOutcome{Rows: 1}
	denied := proto.Errorf(proto.CodePolicyDenied, "not here")
	for _, tc := range []struct {
		name     string
		queries  slowQueries
		rows     string
		code     posternv1.ErrorCode
		inHeader bool // the query's id
		alive    bool // signs of life came
	}{
		{name: "quick", queries: slowQueries{outcome: done}, rows: "rows", inHeader: true},
		{name: "silent before the first row", queries: slowQueries{before: silence, outcome: done}, rows: "rows", alive: true},
		{name: "silent after it", queries: slowQueries{after: silence, outcome: done}, rows: "rows", inHeader: true, alive: true},
		{name: "refused late", queries: slowQueries{before: silence, refuse: denied}, code: proto.CodePolicyDenied, alive: true},
		{
			name: "an error after rows", rows: "rows", code: proto.CodeSQL, inHeader: true,
			queries: slowQueries{outcome: &posternv1.QueryOutcome{Error: &posternv1.ErrorDetail{Code: proto.CodeSQL, Message: "division by zero"}}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			resp, body := ask(t, tc.queries, resultstream.ContentType)
			if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != resultstream.ContentType || resp.Header.Get("X-Accel-Buffering") != "no" {
				t.Fatalf("got %s, %v", resp.Status, resp.Header)
			}
			r := resultstream.NewReader(bytes.NewReader(body))
			rows, err := io.ReadAll(r)
			if err != nil || string(rows) != tc.rows || r.Outcome().GetError().GetCode() != tc.code {
				t.Errorf("got %q, %v, %v", rows, err, r.Outcome())
			}
			if got := resp.Header.Get(proto.QueryIDHeader) != ""; got != tc.inHeader {
				t.Errorf("the query's id in the header: %v, want %v", got, tc.inHeader)
			}
			if tc.queries.refuse == nil && !tc.inHeader && r.QueryID() != "qry_1" {
				t.Errorf("the query's id in the body: got %q", r.QueryID())
			}
			if got := bytes.Contains(body, []byte("K\x00\x00\x00")); got != tc.alive {
				t.Errorf("signs of life: %v, want %v", got, tc.alive)
			}
		})
	}
}

func TestResultStreamSaysSoonErrorsAsStatus(t *testing.T) {
	resp, body := ask(t, slowQueries{refuse: proto.Errorf(proto.CodePolicyDenied, "not here")}, resultstream.ContentType)
	if resp.StatusCode != http.StatusForbidden || !bytes.Contains(body, []byte("not here")) {
		t.Errorf("got %s: %s", resp.Status, body)
	}
}

func TestOthersGetBareArrow(t *testing.T) {
	resp, body := ask(t, slowQueries{outcome: &posternv1.QueryOutcome{}}, "*/*")
	if resp.Header.Get("Content-Type") != "application/vnd.apache.arrow.stream" || string(body) != "rows" {
		t.Errorf("got %s: %q", resp.Header.Get("Content-Type"), body)
	}
}

func TestResultStreamStopsWhenTheClientHangsUp(t *testing.T) {
	finished := make(chan error, 1)
	q := finishing{slowQueries{after: time.Minute}, finished}
	server := httptest.NewServer(New(Config{
		Tokens: analysts{}, Queries: q, Gatherer: prometheus.NewRegistry(), Tunnel: http.NotFoundHandler(), Jupyter: http.NotFoundHandler(), DAV: http.NotFoundHandler(), SignOfLife: 20 * time.Millisecond, Requests: unlimited{},
	}))
	defer server.Close()
	ctx, cancel := context.WithCancel(t.Context())
	req, _ := http.NewRequestWithContext(ctx, http.MethodPost, server.URL+"/api/v1/sql/host/db", strings.NewReader(`{"sql":"select 1"}`))
	req.Header.Set("Authorization", "Bearer x")
	req.Header.Set("Accept", resultstream.ContentType)
	resp, err := server.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	resp.Body.Close()
	select {
	case err := <-finished:
		if err == nil {
			t.Error("it ended as if all had been read")
		}
	case <-time.After(time.Minute):
		t.Error("the query goes on")
	}
}

// finishing tells how a result was finished.
type finishing struct {
	slowQueries
	finished chan error
}

func (q finishing) Start(ctx context.Context, c Caller, agent, source string, s *posternv1.RunSQLRequest) (Result, error) {
	r, err := q.slowQueries.Start(ctx, c, agent, source, s)
	if err != nil {
		return nil, err
	}
	return &finishingResult{r, q.finished}, nil
}

type finishingResult struct {
	Result
	finished chan error
}

func (r *finishingResult) Finish(broke error) *posternv1.QueryOutcome {
	select {
	case r.finished <- broke:
	default:
	}
	if errors.Is(broke, context.Canceled) {
		return &posternv1.QueryOutcome{Error: &posternv1.ErrorDetail{Code: proto.CodeCancelled}}
	}
	return r.Result.Finish(broke)
}
