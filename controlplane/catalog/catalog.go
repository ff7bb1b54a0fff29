package catalog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Bounds of what is kept of one data source.
const (
	MaxColumns = 200_000 // a function, a type, a sequence, and a table without columns, counts as one
	MaxBytes   = 64 << 20
)

const (
	// maxAge is how old a catalog may get before an agent's coming refreshes it.
	maxAge = time.Hour
	// refreshTime bounds one refresh.
	refreshTime = 10 * time.Minute
	// maxKnown bounds the fingerprints sent along, in bytes: the host takes 4 MiB.
	maxKnown = 3 << 20
	// background is how many refreshes run at once that nobody asked for; asked is
	// how many that somebody did.
	background = 2
	asked      = 8
	// maxPending bounds the agents that wait for a refresh in the background. When
	// it is full, a catalog is refreshed when somebody asks, or at the next coming.
	maxPending = 10_000
	// finishTries is how often a refresh is made that ends in vain because another control plane has finished
	// one of the same data source meanwhile.
	finishTries = 3
)

// Store keeps catalogs; see package store.
type Store interface {
	FindAgent(ctx context.Context, organization, idOrName string) (*posternv1.Agent, error)
	CatalogState(ctx context.Context, agent, source string) (schemas []*posternv1.CatalogSchema, sizes map[string][2]int64, refreshed time.Time, truncated bool, err error)
	StageCatalog(ctx context.Context, agent, source, generation string, page *posternv1.CatalogPage) error
	FinishCatalog(ctx context.Context, agent, source, generation string, schemas []*posternv1.CatalogSchema, kept map[string]bool, sizes map[string][2]int64, truncated bool, now time.Time) error
	DropStaged(ctx context.Context, agent, source, generation string) error
	KeepCatalogs(ctx context.Context, agent string, sources []string) error
	SearchCatalog(ctx context.Context, agent string, r *posternv1.IntrospectSourceRequest) (*posternv1.IntrospectSourceResponse, error)
}

// Agent is a live tunnel.
type Agent interface {
	// Introspect hands on the pages that the agent sends.
	Introspect(ctx context.Context, r *posternv1.IntrospectRequest, take func(*posternv1.CatalogPage) error) error
}

// Audit is the organization's log.
type Audit interface {
	Append(ctx context.Context, e auditchain.Entry) error
}

// Config is what a Service needs.
type Config struct {
	Store Store
	Audit Audit
	// Connect returns AGENT_OFFLINE for an agent without a tunnel.
	Connect func(agent string) (Agent, error)
	// Here reports whether the agent's tunnel is to this control plane: only the one that has it refreshes what has become
	// old when an agent comes. nil: all are here.
	Here func(agent string) bool
	// Generation names a refresh.
	Generation func(time.Time) string
	Logger     *slog.Logger
	// Delay is how long a refresh in the background waits; nil means 10 s to 70 s at
	// random, so that hosts that come back together do not all ask their databases
	// at once.
	Delay func() time.Duration
	// MaxColumns is for tests; 0 means MaxColumns.
	MaxColumns int64
}

// Service keeps the catalogs. Make one with New, end it with Close.
type Service struct {
	cfg   Config
	ctx   context.Context // ends with Close
	stop  context.CancelFunc
	wg    sync.WaitGroup
	queue chan job // each waits for its time
	soon  chan job // these do not
	asked chan struct{}

	mu      sync.Mutex
	pending map[string]bool // keys of the jobs in the queue
	flights map[string]*flight
}

// job is an agent whose catalogs are to be looked after.
type job struct {
	organization, agent string
	key                 string // in pending
	due                 time.Time
	force               bool // however fresh they are
}

// flight is a refresh under way; who asks for the same meanwhile waits for it.
type flight struct {
	done chan struct{}
	err  error
}

// New makes a Service.
func New(cfg Config) *Service {
	if cfg.Delay == nil {
		cfg.Delay = func() time.Duration { return 10*time.Second + rand.N(time.Minute) }
	}
	if cfg.Here == nil {
		cfg.Here = func(string) bool { return true }
	}
	if cfg.MaxColumns == 0 {
		cfg.MaxColumns = MaxColumns
	}
	s := &Service{
		cfg: cfg, queue: make(chan job, maxPending), soon: make(chan job, maxPending), asked: make(chan struct{}, asked), pending: map[string]bool{}, flights: map[string]*flight{},
	}
	s.ctx, s.stop = context.WithCancel(context.Background())
	for range background {
		s.wg.Go(s.work)
	}
	return s
}

// Close ends refreshes under way and waits for them.
func (s *Service) Close() {
	s.mu.Lock()
	s.stop()
	s.mu.Unlock()
	s.wg.Wait()
}

// Came notes that an agent has come: what is old of its catalogs is refreshed.
func (s *Service) Came(organization, agent string) { s.add(organization, agent, false, s.cfg.Delay()) }

// Restarted notes that an agent has come that was started since: its policy may be
// another one, so that its catalogs are refreshed however fresh they are.
func (s *Service) Restarted(organization, agent string) {
	s.add(organization, agent, true, s.cfg.Delay())
}

// Changed notes that an agent has other data sources, or another policy.
func (s *Service) Changed(organization, agent string) { s.add(organization, agent, true, 0) }

func (s *Service) add(organization, agent string, force bool, delay time.Duration) {
	key := fmt.Sprint(agent, force, delay > 0)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pending[key] || s.ctx.Err() != nil {
		return
	}
	queue := s.queue
	if delay == 0 {
		queue = s.soon
	}
	select {
	case queue <- job{organization, agent, key, time.Now().Add(delay), force}:
		s.pending[key] = true
	default:
	}
}

// work does what is due; while it waits for one job's time it does those that do not
// wait.
func (s *Service) work() {
	for {
		select {
		case <-s.ctx.Done():
			return
		case j := <-s.soon:
			s.do(j)
		case j := <-s.queue:
			timer := time.NewTimer(time.Until(j.due))
			for waiting := true; waiting; {
				select {
				case <-s.ctx.Done():
					timer.Stop()
					return
				case at := <-s.soon:
					s.do(at)
				case <-timer.C:
					waiting = false
				}
			}
			s.do(j)
		}
	}
}

func (s *Service) do(j job) {
	s.mu.Lock()
	delete(s.pending, j.key)
	s.mu.Unlock()
	s.look(j)
}

// look refreshes what is old of an agent's catalogs, and forgets those of sources
// that it has no more.
func (s *Service) look(j job) {
	if !j.force && !s.cfg.Here(j.agent) {
		return // it has moved meanwhile, and the control plane that it came to looks
	}
	agent, err := s.cfg.Store.FindAgent(s.ctx, j.organization, j.agent)
	if err != nil {
		return
	}
	var sources []string
	for _, source := range agent.Sources {
		sources = append(sources, source.Name)
	}
	if err := s.cfg.Store.KeepCatalogs(s.ctx, agent.Id, sources); err != nil {
		s.cfg.Logger.Warn("old catalogs not forgotten", "agent", agent.Name, "err", err)
	}
	for _, source := range sources {
		_, _, refreshed, _, err := s.cfg.Store.CatalogState(s.ctx, agent.Id, source)
		if err != nil && proto.CodeOf(err) != proto.CodeNotFound {
			return
		}
		if err == nil && !j.force && time.Since(refreshed) < maxAge {
			continue
		}
		if err := s.refresh(s.ctx, agent, source, &posternv1.Principal{Organization: j.organization}, "", nil); err != nil {
			if s.ctx.Err() != nil || proto.CodeOf(err) == proto.CodeAgentOffline {
				return
			}
			s.cfg.Logger.Info("catalog not refreshed", "agent", agent.Name, "source", source, "err", err)
		}
	}
}

// Introspect answers from the cache; it is filled first where it is empty or the
// request says so.
func (s *Service) Introspect(ctx context.Context, p *posternv1.Principal, remote string, r *posternv1.IntrospectSourceRequest) (*posternv1.IntrospectSourceResponse, error) {
	agent, err := s.cfg.Store.FindAgent(ctx, p.Organization, r.Agent)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(agent.Sources, func(i *posternv1.SourceInfo) bool { return i.Name == r.Source }) {
		return nil, proto.Errorf(proto.CodeNotFound, "agent %s has no data source %q: see postern source list", agent.Name, clip(r.Source))
	}
	if !r.Refresh || r.PageToken != "" {
		resp, err := s.read(ctx, agent, p, remote, r)
		if proto.CodeOf(err) != proto.CodeNotFound {
			return resp, err
		}
	}
	if err := s.refresh(ctx, agent, r.Source, p, remote, s.asked); err != nil {
		return nil, err
	}
	return s.read(ctx, agent, p, remote, r)
}

// read answers from the cache. What somebody reads there leaves an entry as what
// somebody asks of the host does: an answer is not given before it is written.
func (s *Service) read(ctx context.Context, agent *posternv1.Agent, p *posternv1.Principal, remote string, r *posternv1.IntrospectSourceRequest) (*posternv1.IntrospectSourceResponse, error) {
	resp, err := s.cfg.Store.SearchCatalog(ctx, agent.Id, r)
	if err != nil {
		return nil, err
	}
	entry := auditchain.Entry{
		Time: time.Now(), Organization: p.Organization, Actor: "token " + p.TokenName, Role: p.Role, Action: "source.introspect.read", Agent: agent.Name, Source: r.Source,
		Target: target(r), Verdict: "allowed", Outcome: "done", Remote: remote,
		Rows: uint64(len(resp.Tables) + len(resp.Functions) + len(resp.Types) + len(resp.Sequences)),
	}
	if err := s.cfg.Audit.Append(context.WithoutCancel(ctx), entry); err != nil {
		return nil, err
	}
	return resp, nil
}

// target is what a reader looked for, for the log.
func target(r *posternv1.IntrospectSourceRequest) string {
	if r.Schema == "" && r.Table == "" {
		return ""
	}
	part := func(pattern string) string {
		if pattern == "" {
			return "*"
		}
		return pattern
	}
	return part(r.Schema) + "." + part(r.Table)
}

// refresh asks the host, or waits for somebody else's asking.
func (s *Service) refresh(ctx context.Context, agent *posternv1.Agent, source string, p *posternv1.Principal, remote string, places chan struct{}) error {
	key := agent.Id + "/" + source
	s.mu.Lock()
	if s.ctx.Err() != nil {
		s.mu.Unlock()
		return proto.Errorf(proto.CodeUnavailable, "this control plane is stopping: try again")
	}
	f := s.flights[key]
	if f == nil {
		f = &flight{done: make(chan struct{})}
		s.flights[key] = f
		s.wg.Go(func() {
			if places != nil {
				select {
				case places <- struct{}{}:
					defer func() { <-places }()
				case <-s.ctx.Done():
				}
			}
			f.err = s.ask(agent, source, p, remote)
			s.mu.Lock()
			delete(s.flights, key)
			s.mu.Unlock()
			close(f.done)
		})
	}
	s.mu.Unlock()
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// ask refreshes a catalog and writes the entry that says so.
func (s *Service) ask(agent *posternv1.Agent, source string, p *posternv1.Principal, remote string) error {
	ctx, cancel := context.WithTimeout(s.ctx, refreshTime)
	defer cancel()
	live, err := s.cfg.Connect(agent.Id)
	if err != nil {
		if proto.CodeOf(err) == proto.CodeAgentOffline {
			return proto.Errorf(proto.CodeAgentOffline, "agent %s is offline: it has no tunnel at present; see `agentd status` on its host", agent.Name)
		}
		return err
	}
	began := time.Now()
	objects, err := s.fetch(ctx, live, agent.Id, source, p)
	if s.ctx.Err() != nil {
		err = proto.Errorf(proto.CodeUnavailable, "this control plane is stopping: try again")
	}
	entry := auditchain.Entry{
		Time: time.Now(), Organization: p.Organization, Actor: "control plane", Role: p.Role, Action: "source.introspect", Agent: agent.Name, Source: source,
		Verdict: "allowed", Outcome: "done", Rows: objects, DurationMillis: time.Since(began).Milliseconds(), Remote: remote,
	}
	if p.TokenName != "" {
		entry.Actor = "token " + p.TokenName
	} else if objects == 0 && err != nil {
		return err // nobody asked, and nothing came
	}
	switch code := proto.CodeOf(err); {
	case code == proto.CodePolicyDenied:
		entry.Verdict, entry.Outcome, entry.Error = "denied", "denied", proto.Detail(err).Message
	case err != nil:
		entry.Outcome, entry.Error = "failed", proto.Detail(err).Message
	}
	if aerr := s.cfg.Audit.Append(context.WithoutCancel(ctx), entry); aerr != nil && err == nil {
		return aerr
	}
	return err
}

// errFull ends a refresh that is beyond the bounds for what is kept from before.
var errFull = errors.New("more than the cache may hold")

// finishError is an error of FinishCatalog.
type finishError struct{ error }

func (e finishError) Unwrap() error { return e.error }

// fetch brings the cache up to date and counts what came.
func (s *Service) fetch(ctx context.Context, live Agent, agent, source string, p *posternv1.Principal) (objects uint64, err error) {
	for range finishTries {
		known, sizes, _, truncated, serr := s.cfg.Store.CatalogState(ctx, agent, source)
		if serr != nil && proto.CodeOf(serr) != proto.CodeNotFound {
			return 0, serr
		}
		if truncated || serr != nil {
			known = nil // what is missing must come anew
		}
		objects, err = s.fill(ctx, live, agent, source, p, known, sizes)
		if errors.Is(err, errFull) {
			// Which part fits is decided over all of it.
			objects, err = s.fill(ctx, live, agent, source, p, nil, nil)
		}
		if _, unfinished := errors.AsType[finishError](err); !unfinished || proto.CodeOf(err) != proto.CodeUnavailable {
			break
		}
	}
	return objects, err
}

// refill is a refresh on its way into the store.
type refill struct {
	schemas  []*posternv1.CatalogSchema
	sizes    map[string][2]int64
	total    [2]int64 // columns, bytes
	objects  uint64
	complete bool
	cut      bool
}

func (s *Service) fill(ctx context.Context, live Agent, agent, source string, p *posternv1.Principal, known []*posternv1.CatalogSchema, before map[string][2]int64) (_ uint64, err error) {
	generation := s.cfg.Generation(time.Now())
	defer func() {
		if err == nil {
			return
		}
		if derr := s.cfg.Store.DropStaged(context.WithoutCancel(ctx), agent, source, generation); derr != nil {
			s.cfg.Logger.Warn("unfinished catalog not forgotten", "source", source, "err", derr)
		}
	}()
	request := &posternv1.IntrospectRequest{Source: source, Principal: p}
	fingerprints := map[string]string{}
	room := maxKnown
	for _, schema := range known {
		if room -= len(schema.Name) + len(schema.Fingerprint) + 16; room < 0 {
			break
		}
		request.Known = append(request.Known, &posternv1.CatalogSchema{Name: schema.Name, Fingerprint: schema.Fingerprint})
		fingerprints[schema.Name] = string(schema.Fingerprint)
	}
	in := &refill{sizes: map[string][2]int64{}}
	err = live.Introspect(ctx, request, func(page *posternv1.CatalogPage) error {
		s.take(in, page)
		if in.cut && len(known) > 0 {
			return errFull
		}
		if len(page.Tables)+len(page.Functions)+len(page.Types)+len(page.Sequences) == 0 {
			return nil
		}
		return s.cfg.Store.StageCatalog(ctx, agent, source, generation, page)
	})
	if err != nil {
		return in.objects, err
	}
	if !in.complete {
		return in.objects, proto.Errorf(proto.CodeAgentLost, "the catalog of %s arrived incomplete: try again", source)
	}
	kept := map[string]bool{}
	for _, schema := range in.schemas {
		if fingerprint, sent := fingerprints[schema.Name]; sent && fingerprint == string(schema.Fingerprint) {
			kept[schema.Name] = true
			in.total[0] += before[schema.Name][0]
			in.total[1] += before[schema.Name][1]
		}
	}
	if in.total[0] > s.cfg.MaxColumns || in.total[1] > MaxBytes {
		return in.objects, errFull
	}
	if err := s.cfg.Store.FinishCatalog(ctx, agent, source, generation, in.schemas, kept, in.sizes, in.cut, time.Now()); err != nil {
		return in.objects, finishError{err}
	}
	return in.objects, nil
}

// take counts a page and cuts it to what may be kept.
func (s *Service) take(in *refill, page *posternv1.CatalogPage) {
	in.complete = in.complete || page.Complete
	fits := func(schema string, columns int, m gproto.Message) bool {
		size := [2]int64{int64(max(1, columns)), int64(gproto.Size(m))}
		if in.total[0]+size[0] > s.cfg.MaxColumns || in.total[1]+size[1] > MaxBytes {
			in.cut = true
			return false
		}
		in.objects++
		for i := range size {
			in.total[i] += size[i]
		}
		of := in.sizes[schema]
		in.sizes[schema] = [2]int64{of[0] + size[0], of[1] + size[1]}
		return true
	}
	page.Tables = slices.DeleteFunc(page.Tables, func(t *posternv1.CatalogTable) bool { return !fits(t.Schema, len(t.Columns), t) })
	page.Functions = slices.DeleteFunc(page.Functions, func(f *posternv1.CatalogFunction) bool { return !fits(f.Schema, 1, f) })
	page.Types = slices.DeleteFunc(page.Types, func(t *posternv1.CatalogType) bool { return !fits(t.Schema, 1+len(t.Attributes), t) })
	page.Sequences = slices.DeleteFunc(page.Sequences, func(q *posternv1.CatalogSequence) bool { return !fits(q.Schema, 1, q) })
	for _, schema := range page.Schemas {
		if !fits(schema.Name, 1, schema) {
			break
		}
		in.schemas = append(in.schemas, schema)
	}
}

func clip(text string) string {
	if len(text) > 80 {
		return fmt.Sprintf("%.80s…", text)
	}
	return text
}
