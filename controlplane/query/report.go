package query

import (
	"context"
	"log/slog"
	"math"
	"time"

	gproto "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// maxReported bounds the statements of one report.
const maxReported = 100

// Report is what an agent tells of the statements that its kernels asked for, checked.
type Report struct {
	// Organization and Agent are ids.
	Organization, Agent string
	// After and Through are entries of the agent's own log: the report covers what is
	// between, Through included.
	After, Through auditchain.Head
	Statements     []Reported
}

// Reported is one statement.
type Reported struct {
	Entry
	// TokenID is "" if there is no such token any more.
	TokenID string
	// Kept are its sealed rows; nil: none.
	Kept []byte
}

// ReportsConfig is what Reports need; all fields are required but Metrics.
type ReportsConfig struct {
	Logger *slog.Logger
	// Find finds an agent of the organization by its id.
	Find func(ctx context.Context, organization, id string) (*posternv1.Agent, error)
	// Reported is up to where an agent's statements are recorded.
	Reported func(ctx context.Context, agent string) (auditchain.Head, error)
	// Known tells which queries are in the history.
	Known func(ctx context.Context, ids []string) (map[string]bool, error)
	// Token finds a token of the organization by its id, revoked ones too; nil: there is none.
	Token func(ctx context.Context, organization, id string) (*posternv1.Token, error)
	// Kernel is the id of the token that a kernel of the organization belongs to; "" if
	// nothing is known of it.
	Kernel func(ctx context.Context, organization, id string) (string, error)
	// Record writes history, audit and Through, durably, all or nothing. UNAVAILABLE
	// means that Reported isn't After any more.
	Record  func(context.Context, Report) error
	Box     Box
	Metrics *Metrics
}

// Reports takes what agents tell of the statements that kernels asked for. Each is
// recorded once: the store keeps how far an agent's log has been told, in the
// transaction that records what was told. It may be used by several goroutines.
type Reports struct {
	cfg   ReportsConfig
	masks maskers
}

// NewReports returns Reports.
func NewReports(cfg ReportsConfig) *Reports { return &Reports{cfg: cfg} }

// Take records a report and returns up to where all is recorded now. A report that does
// not begin there changes nothing.
func (r *Reports) Take(ctx context.Context, organization, agent string, m *posternv1.ReportStatementsRequest) (auditchain.Head, error) {
	now, err := r.cfg.Reported(ctx, agent)
	if err != nil || m.GetThrough().GetSequence() == 0 {
		return now, err
	}
	after, err := auditchain.HeadFromProto(m.After)
	if err != nil {
		return now, proto.Errorf(proto.CodeInvalid, "%v", err)
	}
	through, err := auditchain.HeadFromProto(m.Through)
	switch {
	case err != nil:
		return now, proto.Errorf(proto.CodeInvalid, "%v", err)
	case len(m.Statements) > maxReported:
		return now, proto.Errorf(proto.CodeInvalid, "a report has at most %d statements", maxReported)
	case after != now:
		return now, nil
	}
	report := Report{Organization: organization, Agent: agent, After: after, Through: through}
	if len(m.Statements) > 0 {
		if report.Statements, err = r.check(ctx, organization, agent, m.Statements); err != nil {
			return now, err
		}
	}
	err = r.cfg.Record(ctx, report)
	if proto.CodeOf(err) == proto.CodeUnavailable {
		// Somebody else took a report of this agent, or the store is away: the agent goes
		// on from what is true then.
		if is, rerr := r.cfg.Reported(ctx, agent); rerr == nil && is != now {
			return is, nil
		}
	}
	if err != nil {
		return now, err
	}
	for _, s := range report.Statements {
		r.cfg.Metrics.told(s.Query)
	}
	return through, nil
}

// check makes of what the host says what is recorded. Statements that are recorded
// already are left out.
func (r *Reports) check(ctx context.Context, organization, agentID string, told []*posternv1.KernelStatement) ([]Reported, error) {
	agent, err := r.cfg.Find(ctx, organization, agentID)
	if err != nil {
		return nil, err
	}
	ids := make([]string, len(told))
	for i, s := range told {
		if s.QueryId == "" || len(s.QueryId) > 64 || s.KernelId == "" || len(s.KernelId) > 64 || s.Ended == nil || !s.Ended.IsValid() {
			return nil, proto.Errorf(proto.CodeInvalid, "statement %d of the report has no good id, kernel or time", i)
		}
		ids[i] = s.QueryId
	}
	known, err := r.cfg.Known(ctx, ids)
	if err != nil {
		return nil, err
	}
	var out []Reported
	for _, s := range told {
		if known[s.QueryId] {
			continue
		}
		known[s.QueryId] = true
		one, err := r.one(ctx, organization, agent, s)
		if err != nil {
			return nil, err
		}
		out = append(out, one)
	}
	return out, nil
}

func (r *Reports) one(ctx context.Context, organization string, agent *posternv1.Agent, s *posternv1.KernelStatement) (Reported, error) {
	who := &posternv1.Principal{Organization: organization, TokenName: clip(s.Principal.GetTokenName(), 128), Role: clip(s.Principal.GetRole(), 32)}
	var tokenID string
	// Whose kernel it is we know ourselves, as long as it lives; after that the host does.
	id, err := r.cfg.Kernel(ctx, organization, s.KernelId)
	if err != nil {
		return Reported{}, err
	}
	if id == "" {
		id = s.Principal.GetTokenId()
	}
	token, err := r.cfg.Token(ctx, organization, id)
	if err != nil {
		return Reported{}, err
	}
	if token != nil {
		tokenID, who.TokenId, who.TokenName, who.Role = token.Id, token.Id, token.Name, token.Role
	}
	mask := r.masks.of(agent, s.Source)
	took := s.Duration.AsDuration()
	if s.Duration == nil || !s.Duration.IsValid() || took < 0 {
		took = 0
	}
	now, ended := time.Now(), s.Ended.AsTime()
	if ended.After(now) {
		ended = now
	}
	q := &posternv1.Query{
		Id: s.QueryId, Agent: agent.Name, Source: clip(s.Source, 64), TokenName: who.TokenName, Sql: mask(s.Sql), KernelId: s.KernelId,
		Started: timestamppb.New(ended.Add(-took)), Duration: durationpb.New(took), Rows: min(s.Rows, math.MaxInt64), Bytes: min(s.Bytes, math.MaxInt64),
	}
	if e := s.Error; e != nil {
		q.Error = maskedError(&posternv1.ErrorDetail{Code: e.Code, Message: clip(e.Message, maxMessage), Sql: e.Sql}, mask)
	}
	verdict := "allowed"
	switch {
	case s.Verdict == "denied":
		verdict, q.State = "denied", "denied"
	case s.State == "done" || s.State == "cancelled":
		q.State = s.State
	default:
		q.State = "failed"
	}
	out := Reported{TokenID: tokenID, Entry: Entry{
		Action: "sql.run", Principal: who, Query: q, Verdict: verdict, Target: "kernel " + s.KernelId,
		Remote: "agent, ended " + ended.UTC().Format(time.RFC3339),
	}}
	if k := s.Kept; k != nil && k.First <= maxKeptRows && k.Last <= maxKeptRows && len(k.Arrow) <= maxKeptBytes && len(k.Plan) <= maxPlanBytes {
		plain, err := gproto.Marshal(k)
		if err != nil {
			return Reported{}, proto.Errorf(proto.CodeInvalid, "the rows cannot be encoded: %w", err)
		}
		if out.Kept, err = r.cfg.Box.Seal(plain, RowsAbout(organization, s.QueryId)); err != nil {
			return Reported{}, err
		}
	}
	return out, nil
}
