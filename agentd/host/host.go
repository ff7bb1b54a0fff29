package host

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/proto/wirestream"
)

// Statement is a statement that the policy allowed, with the limits to enforce.
type Statement struct {
	QueryID string
	Source  string
	// Owner is whose database session it runs in; sessions are never shared.
	Owner string
	// Session is one that stays open, of this owner and source; "" is none.
	Session    string
	SQL        string
	Parameters []*posternv1.Parameter
	MaxRows    uint64
	MaxBytes   uint64
	Timeout    time.Duration
	ReadWrite  bool
	// Explain asks for the plan in place of the rows: "plan" or "analyze".
	// HypotheticalIndexes are CREATE INDEX statements as if which it is.
	Explain             string
	HypotheticalIndexes []string
	// KeepFirst and KeepLast are how many of the first and last rows Kept is
	// called with, at most once and before Run returns. Kept may be nil.
	KeepFirst, KeepLast int
	Kept                func(*posternv1.KeptRows)
}

// Introspection is a wish for a source's catalog that the policy allowed.
type Introspection struct {
	Source string
	// Known are schemas that the caller has, with fingerprints.
	Known   []*posternv1.CatalogSchema
	Timeout time.Duration
}

// SQL runs statements.
type SQL interface {
	// Run writes the rows to w as an Arrow IPC stream, with back-pressure, and
	// says how it ended. An error with nothing written to w is one that came
	// before the first row.
	Run(ctx context.Context, s Statement, w io.Writer) (*posternv1.QueryOutcome, error)
	// Check says what works of a source.
	Check(ctx context.Context, source string) []*posternv1.Check
	// Introspect hands on the catalog, less what the policy hides, in bounded
	// pages; the last has Complete set.
	Introspect(ctx context.Context, i Introspection, take func(*posternv1.CatalogPage) error) error
	// OpenSession opens a session that stays. CloseSession ends one of an owner's,
	// CloseSessions all of them: it returns how many. Sessions lists those open.
	OpenSession(ctx context.Context, o OpenSession) (*posternv1.SQLSession, error)
	CloseSession(id, owner, reason string) error
	CloseSessions(owner, reason string) int
	Sessions() []*posternv1.SQLSession
	// Cancel ends a statement; false if it does not run.
	Cancel(queryID string) bool
	Running() []*posternv1.RunningQuery
}

// Audit is the host's log.
type Audit interface {
	// Append returns when the entry is on stable storage.
	Append(ctx context.Context, entry auditchain.Entry) error
	// AppendSoon returns when the entry survives agentd; it survives a loss of power
	// soon after.
	AppendSoon(ctx context.Context, entry auditchain.Entry) error
	Read(from uint64, limit int) ([][]byte, error)
}

// Verdict is what the host's policy says to a statement.
type Verdict struct {
	// Known is false when there is no such source.
	Known   bool
	Allowed bool
	// Reason is one line, when not allowed.
	Reason string
	// The limits to enforce, when allowed.
	MaxRows   uint64
	MaxBytes  uint64
	Timeout   time.Duration
	ReadWrite bool
	// What the control plane may keep of the rows; both 0: nothing.
	KeepFirst, KeepLast int
}

// Config is what a Host needs.
type Config struct {
	Logger  *slog.Logger // nil discards
	Metrics *Metrics     // nil keeps none
	SQL     SQL
	Audit   Audit
	// Wire serves PostgreSQL's own protocol; nil: that is not served.
	Wire WireOpener
	// Kernels runs Jupyter kernels; nil: that is not served. DecideKernel asks the policy
	// whether one may be started.
	Kernels      Kernels
	DecideKernel func(*posternv1.StartKernelRequest) KernelVerdict
	// Secrets gives kernels secrets; nil: that is not served. It needs Kernels.
	Secrets KernelSecrets
	// Checkpoints saves kernels; nil: that is not served. It needs Kernels.
	Checkpoints Checkpoints
	// Moves moves kernels to other hosts; nil: that is not served. It needs Kernels.
	Moves Moves
	// Attachments are mounts of workspaces; nil: that is not served.
	Attachments Attachments
	// Decide asks the policy of the source that the request names.
	Decide func(*posternv1.SQLRequest) Verdict
	// CheckOffered checks a source that somebody on the host offered with a
	// one-time token, which ends with it; false when there is none of this name
	// and token. nil: nothing is offered.
	CheckOffered func(ctx context.Context, source, token string) ([]*posternv1.Check, bool)
	// DecideIntrospection asks the policy of a source whether its catalog may be
	// told of; of the verdict's limits, Timeout counts.
	DecideIntrospection func(source string) Verdict
	// Sources lists the data sources; Status says what HostStatus answers.
	Sources func() []*posternv1.SourceInfo
	Status  func() *posternv1.HostStatusResponse
	// Report tells the control plane of the rows that it may keep. ctx has the
	// values of the request that the statement came with. nil: nothing is kept.
	Report func(ctx context.Context, r *posternv1.ReportRowsRequest) error
	// Local is told of statements of RunLocal; may be nil.
	Local Local
	// MaskText takes out of a text about a source (a statement, an error) what
	// the source's policy masks. nil: nothing.
	MaskText func(source, text string) string
	// Exposition serves the metrics.
	Exposition http.Handler
	// Agent and Organization stand in every audit entry.
	Agent        func() (agent, organization string)
	MaxChecks    int           // source checks and introspections at once; default 4
	MaxReports   int           // reports of rows at once, each at most 1 MiB; what is beyond is not kept; default 16
	AuditTimeout time.Duration // bounds the wait for the log; default 30 s
}

// Host answers the control plane.
type Host struct {
	cfg    Config
	logger *slog.Logger
	mux    *http.ServeMux
	checks chan struct{}
	// reports has an entry for each report under way.
	reports chan struct{}

	// abort ends every statement under way.
	abort    context.Context
	abortNow context.CancelCauseFunc

	settling sync.Mutex // one settle at a time; taken before mu

	// mu guards the following; held for memory alone.
	mu       sync.Mutex
	draining bool
	running  map[string]struct{} // query ids
	wires    map[string]WireSession
	streams  map[io.Closer]struct{} // of kernels
	idle     chan struct{}          // closed when draining and nothing runs
	// unwritten are ends of statements that the log refused. Nothing new begins
	// before they are written, so they are at most as many as may run at once.
	unwritten []auditchain.Entry
}

// ErrAborted is the cause of statements that Abort ended.
var ErrAborted = proto.Errorf(proto.CodeUnavailable, "agentd is stopping: run the statement again")

// New makes a Host.
func New(cfg Config) *Host {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics(nil)
	}
	if cfg.MaxChecks == 0 {
		cfg.MaxChecks = 4
	}
	if cfg.MaxReports == 0 {
		cfg.MaxReports = 16
	}
	if cfg.AuditTimeout == 0 {
		cfg.AuditTimeout = 30 * time.Second
	}
	h := &Host{
		cfg: cfg, logger: cfg.Logger, mux: http.NewServeMux(), checks: make(chan struct{}, cfg.MaxChecks), reports: make(chan struct{}, cfg.MaxReports),
		running: map[string]struct{}{}, wires: map[string]WireSession{}, streams: map[io.Closer]struct{}{}, idle: make(chan struct{}),
	}
	h.abort, h.abortNow = context.WithCancelCause(context.Background())
	h.mux.HandleFunc("POST "+proto.SQLPath, h.serveSQL)
	if cfg.Wire != nil {
		h.mux.HandleFunc("POST "+wirestream.Path, h.serveWire)
	}
	if cfg.Kernels != nil {
		path, kernels := posternv1connect.NewKernelHostServiceHandler(kernelRPC{h}, connect.WithReadMaxBytes(4<<20))
		h.mux.Handle(path, kernels)
		h.mux.HandleFunc("POST "+kernelstream.Path, h.serveChannels)
		if cfg.Moves != nil {
			h.serveMoves()
		}
		if cfg.Secrets != nil {
			path, handler := posternv1connect.NewSecretHostServiceHandler(secretRPC{h}, connect.WithReadMaxBytes(4<<20))
			h.mux.Handle(path, handler)
		}
		if cfg.Checkpoints != nil {
			path, handler := posternv1connect.NewCheckpointHostServiceHandler(checkpointRPC{h}, connect.WithReadMaxBytes(1<<20))
			h.mux.Handle(path, handler)
		}
	}
	if cfg.Attachments != nil {
		path, handler := posternv1connect.NewAttachHostServiceHandler(attachRPC{h}, connect.WithReadMaxBytes(64<<10))
		h.mux.Handle(path, handler)
	}
	if cfg.Exposition != nil {
		h.mux.Handle("GET "+proto.MetricsPath, cfg.Exposition)
	}
	path, service := posternv1connect.NewHostServiceHandler(rpc{h}, connect.WithReadMaxBytes(64<<10))
	h.mux.Handle(path, service)
	// It takes what the caller knows already.
	_, large := posternv1connect.NewHostServiceHandler(rpc{h}, connect.WithReadMaxBytes(maxKnown))
	h.mux.HandleFunc(posternv1connect.HostServiceIntrospectProcedure, func(w http.ResponseWriter, r *http.Request) { h.serveIntrospect(w, r, large) })
	h.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		proto.WriteHTTPError(w, proto.Errorf(proto.CodeNotFound, "the agent serves no such request: is it older than the control plane?"))
	})
	return h
}

// ServeHTTP implements http.Handler. A panic ends the request alone.
func (h *Host) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		if v := recover(); v != nil {
			if err, ok := v.(error); ok && errors.Is(err, http.ErrAbortHandler) {
				panic(v) // the way to break a response off; net/http knows it
			}
			h.logger.Error("request panicked", "path", r.URL.Path, "panic", v)
			panic(http.ErrAbortHandler)
		}
	}()
	h.mux.ServeHTTP(w, r)
}

// Drain refuses new statements from now on and waits until none runs, or ctx
// ends.
func (h *Host) Drain(ctx context.Context) error {
	h.mu.Lock()
	if !h.draining {
		h.draining = true
		if len(h.running) == 0 {
			close(h.idle)
		}
	}
	wires := slices.Collect(maps.Values(h.wires))
	streams := slices.Collect(maps.Keys(h.streams))
	h.mu.Unlock()
	for _, s := range streams {
		_ = s.Close() // its client comes back and misses nothing
	}
	for _, w := range wires {
		w.Drain()
	}
	select {
	case <-h.idle:
		if err := h.settle(); err != nil {
			h.logger.Error("ends of statements not recorded: they count as lost at the next start", "err", err)
		}
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Abort ends every statement under way, and those that come.
func (h *Host) Abort() { h.abortNow(ErrAborted) }

// Running is how many statements are under way.
func (h *Host) Running() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.running)
}

// enter takes a statement in; leave lets it go.
func (h *Host) enter(id string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.draining {
		return proto.Errorf(proto.CodeUnavailable, "the agent is stopping: try again when it is back")
	}
	if _, there := h.running[id]; there {
		return proto.Errorf(proto.CodeInvalid, "query %s runs already", id)
	}
	h.running[id] = struct{}{}
	return nil
}

func (h *Host) leave(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.running, id)
	if h.draining && len(h.running) == 0 {
		close(h.idle)
	}
}

// record appends an entry, on a context of its own: what was done is recorded
// even when the caller has gone.
func (h *Host) record(e auditchain.Entry) error {
	ctx, cancel := context.WithTimeout(context.Background(), h.cfg.AuditTimeout)
	defer cancel()
	if e.Agent == "" && h.cfg.Agent != nil {
		e.Agent, e.Organization = h.cfg.Agent()
	}
	err := h.cfg.Audit.Append(ctx, e)
	if errors.Is(err, context.DeadlineExceeded) {
		err = proto.Errorf(proto.CodeStorageFull, "the host's audit log cannot be written: its disk does not answer")
	}
	return err
}

// settle writes ends that the log refused earlier.
func (h *Host) settle() error {
	h.settling.Lock()
	defer h.settling.Unlock()
	for {
		h.mu.Lock()
		if len(h.unwritten) == 0 {
			h.mu.Unlock()
			return nil
		}
		e := h.unwritten[0]
		h.mu.Unlock()
		if err := h.record(e); err != nil {
			return err
		}
		h.mu.Lock()
		h.unwritten = h.unwritten[1:]
		h.mu.Unlock()
	}
}
