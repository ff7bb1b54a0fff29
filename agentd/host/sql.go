package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	gproto "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Actions in the audit log; package audit knows those of SQL by the same names.
const (
	actionBegin  = "sql.begin"
	actionRun    = "sql.run"
	actionLost   = "sql.lost"
	actionCheck  = "source.check"
	actionCancel = "query.cancel"
)

// maxIDLength bounds ids that come from outside, in bytes.
const maxIDLength = 64

// maxParameters bounds the parameters of a statement.
const maxParameters = 1000

// contentType of the rows.
const contentType = "application/vnd.apache.arrow.stream"

func (h *Host) serveSQL(w http.ResponseWriter, r *http.Request) {
	request, err := readRequest(w, r)
	if err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	id := request.QueryId
	w.Header().Set(proto.QueryIDHeader, id)
	if err := h.enter(id); err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	leave := func() { h.leave(id) }
	defer func() { leave() }()
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	stop := context.AfterFunc(h.abort, func() { cancel(context.Cause(h.abort)) })
	defer stop()

	out := &resultWriter{w: w, control: http.NewResponseController(w), id: id}
	// A write that nobody reads must not outlive the statement.
	unblock := context.AfterFunc(h.abort, func() {
		out.control.SetWriteDeadline(time.Now().Add(time.Second)) //nolint:errcheck // then the tunnel's end unblocks it
	})
	defer unblock()

	outcome, kept, took, err := h.execute(ctx, request, "", out)

	// In a session the client is to know what became of its transaction.
	if !out.begun && err != nil && outcome.GetTransaction() == "" {
		proto.WriteHTTPError(w, err)
		return
	}
	if outcome == nil {
		outcome = &posternv1.QueryOutcome{}
	}
	outcome.QueryId = id
	outcome.Error = proto.Detail(err)
	if outcome.Duration == nil {
		outcome.Duration = durationpb.New(took)
	}
	if kept != nil && h.report(r.Context(), id, kept, leave) {
		outcome.RowsReported = true
		leave = func() {} // the report does, at its end
	}
	out.begin()
	w.Header().Set(proto.OutcomeTrailer, proto.EncodeOutcome(outcome))
}

// execute runs a statement and writes to the log what was meant and how it ended.
// remote is where the request came from, for the log. The outcome may be nil; its error
// is in err.
func (h *Host) execute(ctx context.Context, request *posternv1.SQLRequest, remote string, w io.Writer) (outcome *posternv1.QueryOutcome, kept *posternv1.KeptRows, took time.Duration, err error) {
	entry := auditchain.Entry{
		Actor: actor(request.Principal), Role: request.Principal.GetRole(), Source: request.Source, QueryID: request.QueryId,
		SessionID: request.SessionId, Verdict: "allowed", Statement: h.maskText(request.Source, request.Sql), Remote: remote,
	}
	if remote != "" { // whose kernel; the name in Actor may be another token's one day
		entry.Target = clip(request.Principal.GetTokenId())
	}
	if kind := explain(request.Explain); kind == "analyze" { // what was done, in the log's words
		entry.Statement = "EXPLAIN ANALYZE " + entry.Statement
	} else if kind == "plan" {
		entry.Statement = "EXPLAIN " + entry.Statement
	}
	began := time.Now()
	outcome, begun, err := h.run(ctx, request, &entry, w, func(rows *posternv1.KeptRows) { kept = rows })
	took = time.Since(began)
	if err == nil && outcome.GetError() != nil {
		err = proto.FromDetail(outcome.Error)
	}
	if cause := context.Cause(ctx); err != nil && errors.Is(cause, ErrAborted) {
		err = ErrAborted
	}
	err = h.maskError(request.Source, err)
	entry.Action = actionRun
	entry.Rows, entry.Bytes, entry.DurationMillis = outcome.GetRows(), outcome.GetBytes(), took.Milliseconds()
	entry.Outcome, entry.Time = ending(err), time.Time{}
	if err != nil {
		entry.Error = proto.Detail(err).Message
	}
	if entry.Outcome == "denied" { // by the class that the database gave it
		entry.Verdict = "denied"
	}
	h.cfg.Metrics.queryEnded(entry.Outcome, outcome, took)
	h.finish(entry, begun)
	if proto.CodeOf(err) == proto.CodeInternal {
		h.logger.Error("statement failed", "query", request.QueryId, "source", request.Source, "err", err)
	} else {
		h.logger.Debug("statement ended", "query", request.QueryId, "source", request.Source, "outcome", entry.Outcome, "duration_seconds", took.Seconds(), "bytes", entry.Bytes, "err", err)
	}
	return outcome, kept, took, err
}

func (h *Host) maskText(source, text string) string {
	if h.cfg.MaskText == nil || text == "" {
		return text
	}
	return h.cfg.MaskText(source, text)
}

// maskError holds the patterns of a source on an error that is logged, recorded
// and sent.
func (h *Host) maskError(source string, err error) error {
	if err == nil || h.cfg.MaskText == nil {
		return err
	}
	detail := proto.Detail(err)
	masked := gproto.Clone(detail).(*posternv1.ErrorDetail)
	masked.Message = h.maskText(source, masked.Message)
	if masked.Sql != nil {
		masked.Sql.Hint, masked.Sql.Detail = h.maskText(source, masked.Sql.Hint), h.maskText(source, masked.Sql.Detail)
	}
	if gproto.Equal(detail, masked) {
		return err
	}
	return proto.FromDetail(masked)
}

// run decides, records the intent and runs; begun tells that the intent is in
// the log. A panic below is an error of this statement alone.
func (h *Host) run(ctx context.Context, request *posternv1.SQLRequest, entry *auditchain.Entry, w io.Writer, kept func(*posternv1.KeptRows)) (outcome *posternv1.QueryOutcome, begun bool, err error) {
	defer func() {
		if v := recover(); v != nil {
			h.logger.Error("statement panicked", "query", request.QueryId, "panic", v, "stack", string(debug.Stack()))
			err = proto.Errorf(proto.CodeInternal, "internal error: the detail is in agentd's log on the host")
		}
	}()
	verdict := h.cfg.Decide(request)
	switch {
	case !verdict.Known:
		entry.Verdict = "denied"
		return nil, false, proto.Errorf(proto.CodeNotFound, "this agent has no data source %q: see postern source list", request.Source)
	case !verdict.Allowed:
		entry.Verdict = "denied"
		return nil, false, proto.Errorf(proto.CodePolicyDenied, "source %s: %s", request.Source, verdict.Reason)
	}
	if err := h.settle(); err != nil {
		return nil, false, err
	}
	intent := *entry
	intent.Action = actionBegin
	if err := h.record(intent); err != nil {
		return nil, false, err
	}
	begun = true
	if err := context.Cause(ctx); err != nil {
		return nil, true, err
	}
	h.cfg.Metrics.queryBegan()
	defer h.cfg.Metrics.queryLeft()
	statement := Statement{
		QueryID: request.QueryId, Source: request.Source, Owner: owner(request.Principal), Session: request.SessionId,
		SQL: request.Sql, Parameters: request.Parameters,
		MaxRows: verdict.MaxRows, MaxBytes: verdict.MaxBytes, Timeout: verdict.Timeout, ReadWrite: verdict.ReadWrite,
		Explain: explain(request.Explain), HypotheticalIndexes: request.HypotheticalIndexes,
	}
	if request.TakesRows && (h.cfg.Report != nil || entry.Remote != "") && verdict.KeepFirst+verdict.KeepLast > 0 {
		statement.KeepFirst, statement.KeepLast, statement.Kept = verdict.KeepFirst, verdict.KeepLast, kept
	}
	outcome, err = h.cfg.SQL.Run(ctx, statement, w)
	return outcome, true, err
}

// reportTime bounds the report of a statement's rows.
const reportTime = 30 * time.Second

// report sends the rows that the control plane may keep, beside the end of the
// result, which does not wait for them; done is called at its end. It tells whether
// it will try at all. What is lost on the way is lost: the statement is as good.
func (h *Host) report(ctx context.Context, id string, rows *posternv1.KeptRows, done func()) bool {
	select {
	case h.reports <- struct{}{}:
	default:
		h.logger.Warn("rows not reported: too many reports are under way", "query", id)
		return false
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reportTime)
	unblock := context.AfterFunc(h.abort, cancel)
	go func() {
		defer done()
		defer func() { <-h.reports }()
		defer cancel()
		defer unblock()
		if err := h.cfg.Report(ctx, &posternv1.ReportRowsRequest{QueryId: id, Rows: rows}); err != nil {
			h.logger.Warn("rows not reported", "query", id, "err", err)
		}
	}()
	return true
}

// finish records how a statement ended; what the log refuses now is kept, and
// holds up the next statement until it is written.
func (h *Host) finish(entry auditchain.Entry, begun bool) {
	err := h.record(entry)
	if err == nil {
		return
	}
	h.logger.Error("end of a statement not recorded yet", "query", entry.QueryID, "err", err)
	if !begun {
		return // nothing was done, and nothing waits for its end
	}
	entry.Time = time.Now()
	h.mu.Lock()
	h.unwritten = append(h.unwritten, entry)
	h.mu.Unlock()
}

// Recover writes the end of statements and sessions that were under way when agentd
// died.
func (h *Host) Recover(begun []auditchain.Entry) error {
	for _, e := range begun {
		lost := e
		lost.Action, lost.Outcome, lost.Time = actionLost, "failed", time.Time{}
		lost.Error = "agentd died while the statement ran: the database was told to cancel it; whether it had finished is not known"
		if e.Action == actionWireOpen {
			lost.Action, lost.Error = actionWireClose, "agentd died while the session was open"
		}
		if err := h.record(lost); err != nil {
			return err
		}
		h.logger.Warn("statement or session lost", "query", e.QueryID, "session", e.SessionID, "source", e.Source)
	}
	return nil
}

func readRequest(w http.ResponseWriter, r *http.Request) (*posternv1.SQLRequest, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, proto.MaxSQLRequest))
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return nil, proto.Errorf(proto.CodeBodyTooLarge, "the statement and its parameters take more than %d bytes", int64(proto.MaxSQLRequest))
	} else if err != nil {
		return nil, proto.Errorf(proto.CodeInvalid, "the request ended early")
	}
	var request posternv1.SQLRequest
	if err := gproto.Unmarshal(body, &request); err != nil {
		return nil, proto.Errorf(proto.CodeInvalid, "the request is not a SQLRequest")
	}
	if err := checkRequest(&request); err != nil {
		return nil, err
	}
	return &request, nil
}

// checkRequest refuses what makes no sense.
func checkRequest(request *posternv1.SQLRequest) error {
	switch {
	case !validID(request.QueryId):
		return proto.Errorf(proto.CodeInvalid, "the request has no good query id")
	case request.SessionId != "" && !validID(request.SessionId):
		return proto.Errorf(proto.CodeInvalid, "the request has no good session id")
	case request.Source == "" || len(request.Source) > maxIDLength:
		return proto.Errorf(proto.CodeInvalid, "the request names no data source")
	case strings.TrimSpace(request.Sql) == "":
		return proto.Errorf(proto.CodeInvalid, "the statement is empty")
	case len(request.Parameters) > maxParameters:
		return proto.Errorf(proto.CodeInvalid, "the statement has %d parameters, more than %d", len(request.Parameters), maxParameters)
	case explain(request.Explain) == "?":
		return proto.Errorf(proto.CodeInvalid, "the request asks for a plan of a kind that this version of agentd does not know")
	case len(request.HypotheticalIndexes) > 0 && request.Explain != posternv1.Explain_EXPLAIN_PLAN:
		return proto.Errorf(proto.CodeInvalid, "hypothetical indexes are for a plan alone: ask for it with --explain, without --analyze")
	case request.Timeout != nil && !request.Timeout.IsValid():
		return proto.Errorf(proto.CodeInvalid, "the request's timeout is out of range")
	}
	return nil
}

// explain is what is asked for in place of rows: "", "plan", "analyze", or "?" for
// what is not known.
func explain(e posternv1.Explain) string {
	switch e {
	case posternv1.Explain_EXPLAIN_UNSPECIFIED:
		return ""
	case posternv1.Explain_EXPLAIN_PLAN:
		return "plan"
	case posternv1.Explain_EXPLAIN_ANALYZE:
		return "analyze"
	}
	return "?"
}

func validID(id string) bool {
	if id == "" || len(id) > maxIDLength {
		return false
	}
	for _, c := range []byte(id) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' && c != '-' {
			return false
		}
	}
	return true
}

// actor is who asks, for the log.
func actor(p *posternv1.Principal) string {
	switch {
	case p.GetTokenName() != "":
		return "token " + clip(p.TokenName)
	case p.GetTokenId() != "":
		return "token " + clip(p.TokenId)
	}
	return "control plane"
}

// owner keeps the database sessions of different tokens and tenants apart.
func owner(p *posternv1.Principal) string {
	return fmt.Sprintf("%q/%q", clip(p.GetOrganization()), clip(p.GetTokenId()))
}

func clip(s string) string {
	if len(s) > 2*maxIDLength {
		return s[:2*maxIDLength]
	}
	return s
}

// ending is how a statement ended, in the log's words.
func ending(err error) string {
	switch proto.CodeOf(err) {
	case posternv1.ErrorCode_ERROR_CODE_UNSPECIFIED:
		return "done"
	case proto.CodePolicyDenied, proto.CodeRoleDenied:
		return "denied"
	case proto.CodeCancelled:
		return "cancelled"
	}
	return "failed"
}

// resultWriter sends the header with the first byte, and each write at once: the
// sender batches already.
type resultWriter struct {
	w       http.ResponseWriter
	control *http.ResponseController
	id      string
	begun   bool
}

func (r *resultWriter) begin() {
	if r.begun {
		return
	}
	r.begun = true
	h := r.w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Trailer", proto.OutcomeTrailer)
	h.Set("X-Content-Type-Options", "nosniff")
	r.w.WriteHeader(http.StatusOK)
}

// Write implements io.Writer.
func (r *resultWriter) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	r.begin()
	n, err := r.w.Write(p)
	if err == nil {
		err = r.control.Flush()
	}
	return n, err
}
