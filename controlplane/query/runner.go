package query

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Agent is a live tunnel to an agent.
type Agent interface {
	// Do sends a request to the agent on a lane for bulk bodies.
	Do(*http.Request) (*http.Response, error)
	// CancelQuery asks the agent to end a statement.
	CancelQuery(context.Context, *posternv1.CancelQueryRequest) error
	// Err is why the tunnel ended, as an error with the code AGENT_LOST; nil
	// while it is up.
	Err() error
}

// Config is what a Runner needs; all fields are required but Metrics.
type Config struct {
	Logger *slog.Logger
	// Connect returns the agent's live tunnel, by the agent's id; AGENT_OFFLINE
	// if it has none.
	Connect func(agentID string) (Agent, error)
	// Find returns an agent of the organization by id or name, or NOT_FOUND.
	Find    func(ctx context.Context, organization, agent string) (*posternv1.Agent, error)
	History History
	Audit   Audit
	Metrics *Metrics
	// Box seals the rows that are kept with the history.
	Box Box
}

// Box seals what rests in the store. about is authenticated: what was sealed for
// one thing opens for no other.
type Box interface {
	Seal(plain []byte, about string) ([]byte, error)
	Open(sealed []byte, about string) ([]byte, error)
}

// History keeps the queries. Entries are scoped by organization.
type History interface {
	InsertQuery(ctx context.Context, organization, tokenID string, q *posternv1.Query) error
	FinishQuery(ctx context.Context, organization string, q *posternv1.Query) error
	// KeepRows keeps the sealed rows of a query; KeptRows returns them, nil if
	// there are none.
	KeepRows(ctx context.Context, organization, id string, sealed []byte, now time.Time) error
	KeptRows(ctx context.Context, organization, id string) ([]byte, error)
}

// Audit writes one entry; it is durable when Append returns.
type Audit interface {
	Append(ctx context.Context, e Entry) error
}

// Entry is what a finished query, or a session, leaves in the organization's audit
// log.
type Entry struct {
	// Action is what was done; empty means "sql.run".
	Action string
	// Target is what it was done in, where the query does not say.
	Target    string
	Principal *posternv1.Principal
	Query     *posternv1.Query
	Verdict   string
	Remote    string
	// SessionID is the session that stays open which it ran in.
	SessionID string
}

// Runner runs statements. It is safe for concurrent use.
type Runner struct {
	cfg Config

	mu      sync.Mutex
	running map[string]*Result
	// reports are the queries whose rows may still be reported.
	reports map[string]*report

	maskers maskers
}

// NewRunner returns a runner.
func NewRunner(cfg Config) *Runner {
	return &Runner{cfg: cfg, running: map[string]*Result{}, reports: map[string]*report{}}
}

// Request is a statement and who asks for it.
type Request struct {
	Principal *posternv1.Principal
	// Agent is the agent's id or name.
	Agent, Source string
	Statement     *posternv1.RunSQLRequest
	// Remote is the caller's address, for the audit log.
	Remote string
}

// Result is a statement under way. Body is its Arrow IPC stream.
type Result struct {
	QueryID string
	Body    io.Reader

	runner    *Runner
	request   Request
	query     *posternv1.Query
	mask      func(string) string // for texts that are stored
	agent     Agent
	agentName string
	response  *http.Response
	cancel    context.CancelCauseFunc
	done      chan struct{} // closed by Finish
	once      sync.Once
	outcome   *posternv1.QueryOutcome
	readErr   error
}

// Start sends the statement. The error, if any, has already been recorded; rows
// may follow otherwise, and Finish must be called. ctx bounds the whole query.
func (r *Runner) Start(ctx context.Context, req Request) (*Result, error) {
	agent, err := r.cfg.Find(ctx, req.Principal.Organization, req.Agent)
	if err != nil {
		return nil, err
	}
	res := &Result{
		QueryID: proto.NewID(proto.QueryPrefix), runner: r, request: req, done: make(chan struct{}), agentName: agent.Name,
	}
	res.mask = r.maskers.of(agent, req.Source)
	res.query = &posternv1.Query{
		Id: res.QueryID, Agent: agent.Name, Source: req.Source, TokenName: req.Principal.TokenName,
		Sql: res.mask(req.Statement.Sql), State: "running", Started: timestamppb.Now(), SessionId: req.Statement.SessionId,
	}
	if err := r.cfg.History.InsertQuery(ctx, req.Principal.Organization, req.Principal.TokenId, res.query); err != nil {
		return nil, err
	}
	ctx, res.cancel = context.WithCancelCause(ctx)
	r.mu.Lock()
	r.running[res.QueryID] = res
	r.expectLocked(res.QueryID, req.Principal.Organization, agent.Id)
	r.mu.Unlock()
	r.cfg.Metrics.started()
	if err := res.send(ctx, agent.Id); err != nil {
		return nil, proto.FromDetail(res.Finish(err).Error)
	}
	res.Body = &body{res: res, ctx: ctx}
	return res, nil
}

func (res *Result) send(ctx context.Context, agentID string) error {
	agent, err := res.runner.cfg.Connect(agentID)
	if err != nil {
		if proto.CodeOf(err) == proto.CodeAgentOffline {
			err = &proto.Error{Code: proto.CodeAgentOffline, Message: fmt.Sprintf("agent %s is offline: it has no tunnel at present; see `agentd status` on its host", res.agentName)}
		}
		return err
	}
	res.runner.mu.Lock()
	res.agent = agent
	res.runner.mu.Unlock()
	statement := res.request.Statement
	encoded, err := gproto.Marshal(&posternv1.SQLRequest{
		QueryId: res.QueryID, Source: res.request.Source, Sql: statement.Sql, Principal: res.request.Principal,
		MaxRows: statement.MaxRows, MaxBytes: statement.MaxBytes, Timeout: statement.Timeout, Parameters: statement.Parameters,
		TakesRows: true, SessionId: statement.SessionId, Explain: statement.Explain, HypotheticalIndexes: statement.HypotheticalIndexes,
	})
	if err != nil {
		return proto.Errorf(proto.CodeInvalid, "the statement is not valid UTF-8")
	}
	if len(encoded) > proto.MaxSQLRequest {
		return proto.Errorf(proto.CodeBodyTooLarge, "the statement and its parameters have %d bytes, more than %d", len(encoded), proto.MaxSQLRequest)
	}
	httpReq, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agent"+proto.SQLPath, bytes.NewReader(encoded))
	if err != nil {
		return err
	}
	httpReq.Header.Set("Content-Type", "application/protobuf")
	resp, err := agent.Do(httpReq)
	if err != nil {
		return res.explain(ctx, err)
	}
	res.response = resp
	if resp.StatusCode != http.StatusOK {
		return proto.ReadHTTPError(resp)
	}
	return nil
}

// explain says why the exchange with the agent broke.
func (res *Result) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		if cause := context.Cause(ctx); proto.CodeOf(cause) != proto.CodeInternal {
			return cause
		}
	}
	if lost := res.agent.Err(); lost != nil {
		return lost
	}
	return &proto.Error{
		Code:    proto.CodeAgentLost,
		Message: fmt.Sprintf("agent %s stopped answering while the query was under way: agentd or its link died; the rows so far are incomplete", res.agentName),
		Err:     err,
	}
}

// body reads the rows and notes how they end.
type body struct {
	res *Result
	ctx context.Context
}

// Read returns io.EOF only when the agent said that the result ends here, well
// or not; then Finish has the outcome.
func (b *body) Read(p []byte) (int, error) {
	n, err := b.res.response.Body.Read(p)
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		outcome, derr := proto.DecodeOutcome(b.res.response.Trailer.Get(proto.OutcomeTrailer))
		if derr != nil {
			b.res.readErr = b.res.explain(b.ctx, derr)
			return n, b.res.readErr
		}
		b.res.outcome = outcome
	default:
		err = b.res.explain(b.ctx, err)
		b.res.readErr = err
	}
	return n, err
}

// Finish ends the query: with nil if Body was read to its end, else with what
// broke off the reading or the sending of its rows. It releases the stream and
// records the outcome. Only the first call counts.
func (res *Result) Finish(broke error) *posternv1.QueryOutcome {
	res.once.Do(func() { res.finish(broke) })
	return res.outcome
}

func (res *Result) finish(broke error) {
	r := res.runner
	if broke == nil && res.outcome == nil {
		broke = res.readErr
		if broke == nil {
			broke = proto.Errorf(proto.CodeCancelled, "the reader of the result went away")
		}
	}
	if broke != nil && (res.outcome == nil || res.outcome.Error == nil) {
		if cause := res.readErr; cause != nil {
			broke = cause
		}
		known := res.outcome
		res.outcome = &posternv1.QueryOutcome{Error: proto.Detail(broke), Rows: known.GetRows(), Bytes: known.GetBytes()}
	}
	res.cancel(context.Canceled)
	if res.response != nil {
		res.response.Body.Close() //nolint:errcheck // the stream is done with either way
	}
	r.mu.Lock()
	delete(r.running, res.QueryID)
	// Who hangs up before the answer has begun leaves an agent that may be at work.
	ran := res.agent != nil && (res.response == nil || res.response.StatusCode == http.StatusOK)
	r.endedLocked(res.QueryID, ran && (broke != nil || res.outcome.RowsReported), res.outcome.RowsReported)
	r.mu.Unlock()
	close(res.done)

	took := time.Since(res.query.Started.AsTime())
	res.outcome.QueryId = res.QueryID
	if res.outcome.Duration == nil {
		res.outcome.Duration = durationpb.New(took)
	}
	q := res.query
	q.Rows, q.Bytes, q.Duration, q.Error = res.outcome.Rows, res.outcome.Bytes, durationpb.New(took), maskedError(res.outcome.Error, res.mask)
	q.State = state(q.Error)
	r.cfg.Metrics.finished(q)
	if broke != nil && proto.CodeOf(broke) == proto.CodeInternal {
		r.cfg.Logger.Error("query failed", "query", q.Id, "agent", q.Agent, "source", q.Source, "err", broke)
	}
	r.record(res)
}

// recordTime bounds the writing of history and audit after the caller has gone.
const recordTime = 10 * time.Second

func (r *Runner) record(res *Result) {
	ctx, cancel := context.WithTimeout(context.Background(), recordTime)
	defer cancel()
	verdict := "allowed"
	if res.query.State == "denied" {
		verdict = "denied"
	}
	entry := Entry{Principal: res.request.Principal, Query: res.query, Verdict: verdict, Remote: res.request.Remote, SessionID: res.request.Statement.SessionId}
	if err := r.cfg.Audit.Append(ctx, entry); err != nil {
		r.cfg.Logger.Error("audit entry not written", "query", res.QueryID, "err", err)
		if res.outcome.Error == nil {
			res.outcome.Error = proto.Detail(err)
		}
	}
	if err := r.cfg.History.FinishQuery(ctx, res.request.Principal.Organization, res.query); err != nil {
		r.cfg.Logger.Error("query history not written", "query", res.QueryID, "err", err)
	}
}

func state(e *posternv1.ErrorDetail) string {
	switch e.GetCode() {
	case 0:
		return "done"
	case proto.CodePolicyDenied:
		return "denied"
	case proto.CodeCancelled:
		return "cancelled"
	}
	return "failed"
}

// cancelPatience is how long a cancelled query may take to end by itself before
// its stream is cut.
const cancelPatience = 2 * time.Second

// Cancel ends a query of the organization that runs here. It reports false if
// there is none; may decides whether this principal may cancel it.
func (r *Runner) Cancel(ctx context.Context, by *posternv1.Principal, queryID string, may func(owner *posternv1.Principal) error) (bool, error) {
	r.mu.Lock()
	res := r.running[queryID]
	var agent Agent
	if res != nil {
		agent = res.agent
	}
	r.mu.Unlock()
	if res == nil || res.request.Principal.Organization != by.Organization {
		return false, nil
	}
	if err := may(res.request.Principal); err != nil {
		return true, err
	}
	ctx, cancel := context.WithTimeout(ctx, cancelPatience)
	defer cancel()
	if agent != nil {
		err := agent.CancelQuery(ctx, &posternv1.CancelQueryRequest{QueryId: queryID, Principal: by})
		if err == nil {
			select {
			case <-res.done:
				return true, nil
			case <-ctx.Done():
			}
		}
	}
	res.cancel(proto.Errorf(proto.CodeCancelled, "the query was cancelled by token %s", by.TokenName))
	return true, nil
}

// CancelAll ends every query with cause, for a control plane that stops.
func (r *Runner) CancelAll(cause error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, res := range r.running {
		res.cancel(cause)
	}
}

// Running is the number of queries under way.
func (r *Runner) Running() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.running)
}
