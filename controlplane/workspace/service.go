package workspace

import (
	"context"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Store remembers trees. See package store for what its methods promise.
type Store interface {
	InsertWorkspace(ctx context.Context, w *filetree.Workspace, root *filetree.Node) error
	Workspaces(ctx context.Context, organization string) ([]*filetree.Workspace, error)
	Workspace(ctx context.Context, organization, idOrName string) (*filetree.Workspace, error)
	WorkspaceSeq(ctx context.Context, number int64) (uint64, error)
	SetWorkspace(ctx context.Context, w *filetree.Workspace) error
	DeleteWorkspace(ctx context.Context, number int64, now time.Time) error
	UpdateFiles(ctx context.Context, organization, id string, f func(filetree.Tx) error) error
	ReadFiles(ctx context.Context, organization, id string, f func(filetree.Tx) error) error
	MissingChunks(ctx context.Context, organization string, workspace int64, hashes []filetree.Hash, now time.Time) ([]filetree.Hash, error)
	SetMountStatus(ctx context.Context, organization, agent string, statuses map[string][]byte, now time.Time) error
	MountReports(ctx context.Context, organization, workspace, agent string) ([]filetree.MountReport, error)
	LiveWorkspaces(ctx context.Context) ([]*filetree.Workspace, error)
	PurgeWorkspaces(ctx context.Context, limit int) (int, error)
	// FindAgent finds an agent by its id or name, or NOT_FOUND.
	FindAgent(ctx context.Context, organization, idOrName string) (*posternv1.Agent, error)
}

// Chunks keeps the chunks of contents. See package blob.
type Chunks interface {
	Put(ctx context.Context, organization string, workspace int64, chunks [][]byte) ([]filetree.Hash, error)
	Get(ctx context.Context, organization string, workspace int64, hashes []filetree.Hash) ([][]byte, error)
	Each(ctx context.Context, organization string, workspace int64, hashes []filetree.Hash, found func(bytes int64), each func(chunk []byte) error) error
}

// Limiter bounds how often a key may do something; see package ratelimit.
type Limiter interface {
	Allow(key string) bool
}

// Caller is a user of the API.
type Caller struct {
	*posternv1.Principal
	Remote string
}

// Agent is an agent that calls on its tunnel.
type Agent struct {
	// Organization and ID are ids.
	Organization, ID, Name string
}

// Config is what a Service needs. All fields are required unless said otherwise.
type Config struct {
	Logger *slog.Logger
	Store  Store
	Chunks Chunks
	// Append writes entries of the audit log, all of one organization, or fails.
	Append func(ctx context.Context, entries []auditchain.Entry) error
	// Caller tells who calls the API, and Agent who calls on a tunnel.
	Caller func(ctx context.Context) Caller
	Agent  func(ctx context.Context) Agent
	// Ask asks an agent for the status of its mounts; AGENT_OFFLINE if it is.
	Ask func(ctx context.Context, agent string, r *posternv1.GetAttachStatusRequest) (*posternv1.GetAttachStatusResponse, error)
	// Ops bounds the requests of each agent that read or change trees, by its id.
	Ops Limiter
	// Poll is how often other replicas' changes are looked for; 0: there are none.
	Poll time.Duration
	// SignOfLife is how often a silent stream of changes says so; 0 means 15 s.
	SignOfLife time.Duration
	// OrganizationNodes bounds the files, directories and links of all workspaces of an
	// organization together, and four times it the rows that are kept of them; 0: no limit.
	// Workspaces that are changed at the same moment may exceed it by what those changes add.
	OrganizationNodes uint64
	// Metrics is optional.
	Metrics *Metrics
}

const (
	// defaultQuotaBytes and defaultQuotaNodes are a new workspace's limits.
	defaultQuotaBytes = 1 << 40
	defaultQuotaNodes = 10_000_000
	// defaultKeepVersions and defaultKeepFor are a new workspace's history.
	defaultKeepVersions = 100
	defaultKeepFor      = 30 * 24 * time.Hour
	// workspacePrefix begins a workspace's id.
	workspacePrefix = "wsp_"
)

// Service knows workspaces. Close ends the streams of changes.
type Service struct {
	cfg    Config
	busy   *busy
	bell   *bell
	reads  reads
	ctx    context.Context
	cancel context.CancelFunc
	// gathered is closed when gather has ended.
	gathered chan struct{}
}

// New returns a service.
func New(cfg Config) *Service {
	if cfg.SignOfLife == 0 {
		cfg.SignOfLife = 15 * time.Second
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &Service{cfg: cfg, busy: newBusy(), bell: newBell(), ctx: ctx, cancel: cancel, gathered: make(chan struct{})}
	s.reads.by = map[readKey]*deeds{}
	go s.gather()
	return s
}

// Close ends the streams of changes, whose goroutines are their callers', and writes what
// is to be written.
func (s *Service) Close() {
	s.cancel()
	<-s.gathered
}

// create makes a workspace.
func (s *Service) create(ctx context.Context, organization, name string) (*filetree.Workspace, error) {
	if err := checkWorkspaceName(name); err != nil {
		return nil, err
	}
	now := time.Now()
	at := now.UnixNano()
	w := &filetree.Workspace{
		ID: proto.NewID(workspacePrefix), Organization: organization, Name: name, Created: now,
		Seq: 1, NextID: filetree.LastReserved + 1, OldestChange: 2,
		QuotaBytes: defaultQuotaBytes, QuotaNodes: defaultQuotaNodes, KeepVersions: defaultKeepVersions, KeepFor: defaultKeepFor,
	}
	root := &filetree.Node{ID: filetree.Root, Type: filetree.Directory, Mode: 0o755, Mtime: at, Ctime: at, Btime: at, Links: 1, Seq: 1}
	return w, s.cfg.Store.InsertWorkspace(ctx, w, root)
}

// forAgent finds a workspace that an agent may see.
func (s *Service) forAgent(ctx context.Context, a Agent, idOrName string) (*filetree.Workspace, error) {
	w, err := s.cfg.Store.Workspace(ctx, a.Organization, idOrName)
	if err != nil {
		return nil, err
	}
	if len(w.Agents) > 0 && !slices.Contains(w.Agents, a.Name) {
		return nil, proto.Errorf(proto.CodeNotFound, "workspace %q not found", clip(idOrName))
	}
	return w, nil
}

// walk follows names from the root; nil if there is nothing.
func (t *tree) walk(parts [][]byte) (*node, error) {
	n, err := t.node(filetree.Root)
	for _, part := range parts {
		if err != nil || n == nil || n.Type != filetree.Directory {
			return nil, err
		}
		n, err = t.lookup(n.ID, part)
	}
	return n, err
}

func parseTrashName(name []byte) (uint64, bool) {
	id, err := strconv.ParseUint(string(name), 10, 63)
	return id, err == nil
}

// bell wakes those who wait for changes of a workspace.
type bell struct {
	mu   sync.Mutex
	wait map[int64]chan struct{} // by workspace; closed when it changes
}

func newBell() *bell { return &bell{wait: map[int64]chan struct{}{}} }

// listen returns what is closed at the next change.
func (b *bell) listen(workspace int64) <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.wait[workspace]
	if c == nil {
		c = make(chan struct{})
		b.wait[workspace] = c
	}
	return c
}

func (b *bell) ring(workspace int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c := b.wait[workspace]; c != nil {
		close(c)
		delete(b.wait, workspace)
	}
}

// busy bounds what one agent or token has under way at once.
type busy struct {
	mu   sync.Mutex
	have map[string]int
}

func newBusy() *busy { return &busy{have: map[string]int{}} }

// enter takes a place of at most limit under a key; leave must be called if it is not an
// error.
func (b *busy) enter(key string, limit int) (leave func(), err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.have[key] >= limit {
		return nil, proto.Errorf(proto.CodeOverloaded, "%d such requests are under way already: wait for one to end", limit)
	}
	b.have[key]++
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.have[key]--; b.have[key] == 0 {
			delete(b.have, key)
		}
	}, nil
}

// deeds tells, for the audit log, what an agent's operations did.
type deeds struct {
	lines []byte
	more  int
	ops   int
	bytes uint64
}

// maxDeeds bounds the text, in bytes.
const maxDeeds = 48 << 10

func (d *deeds) add(what string, path []byte, bytes uint64) {
	d.ops++
	d.bytes += bytes
	d.line(what + " " + strconv.Quote(string(path)))
}

func (d *deeds) conflict(wanted, kept []byte) {
	d.line("conflict " + strconv.Quote(string(wanted)) + " kept as " + strconv.Quote(string(kept)))
}

func (d *deeds) line(text string) {
	if len(d.lines)+len(text) > maxDeeds {
		d.more++
		return
	}
	d.lines = append(append(d.lines, text...), '\n')
}

func (d *deeds) text() string {
	if d.more > 0 {
		return string(d.lines) + "and " + strconv.Itoa(d.more) + " more"
	}
	return string(d.lines)
}

// note writes what an agent did.
func (s *Service) note(ctx context.Context, a Agent, w *filetree.Workspace, action string, d *deeds) error {
	return s.cfg.Append(ctx, []auditchain.Entry{{
		Time: time.Now(), Organization: a.Organization, Actor: "agent " + a.Name, Agent: a.ID, Action: action, Target: w.Name,
		Statement: d.text(), Rows: uint64(d.ops), Bytes: d.bytes, Outcome: "done",
	}})
}
