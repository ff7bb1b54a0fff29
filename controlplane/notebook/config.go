package notebook

import (
	"context"
	"io"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxRuns bounds the runs at once, and maxOfToken those of one token.
	maxRuns, maxOfToken = 64, 8
	// maxBooks bounds the kernels whose state is remembered.
	maxBooks = 256
	// maxCells bounds a notebook's code cells, maxID a cell's id in bytes.
	maxCells, maxID = 2000, 64
	// maxOutput bounds what is kept of a cell's outputs, in bytes.
	maxOutput = 4 << 20
	// stopTime bounds the stop of a kernel that was started for a run.
	stopTime = time.Minute
)

// Caller is who asks, and from where.
type Caller struct {
	*posternv1.Principal
	Remote string
}

// Attach asks for a kernel's channels: see package kernel.
type Attach struct {
	Kernel, Client string
	Resume         bool
	After          uint64
	Again          bool
}

// Channels are a kernel's channels: a stream of package kernelstream.
type Channels interface {
	io.ReadWriteCloser
	// Retired is closed when the stream should be opened anew.
	Retired() <-chan struct{}
	// Record writes the audit entry of a message before it is sent.
	Record(ctx context.Context, header jupyter.Header, m *posternv1.KernelMessage) error
}

// Kernels are the kernels of agents. Errors carry codes of package proto; a kernel that
// is gone, or another token's, is NOT_FOUND.
type Kernels interface {
	Start(ctx context.Context, c Caller, agent, spec string, mounts []*posternv1.KernelMount) (*posternv1.AgentKernel, error)
	Get(ctx context.Context, c Caller, id string) (*posternv1.AgentKernel, error)
	Interrupt(ctx context.Context, c Caller, id string) error
	Restart(ctx context.Context, c Caller, id string) error
	Stop(ctx context.Context, c Caller, id string) error
	Attach(ctx context.Context, c Caller, a Attach) (Channels, error)
	CheckpointKernel(ctx context.Context, c Caller, r *posternv1.CheckpointKernelRequest) (*posternv1.CheckpointKernelResponse, error)
	RollbackKernel(ctx context.Context, c Caller, r *posternv1.KernelCheckpointRequest) error
	ResumeKernel(ctx context.Context, c Caller, r *posternv1.KernelCheckpointRequest) error
	ListCheckpoints(ctx context.Context, c Caller, r *posternv1.KernelCheckpointRequest) (*posternv1.ListCheckpointsResponse, error)
}

// Config is what a Service needs.
type Config struct {
	Logger  *slog.Logger
	Kernels Kernels
}

// Service runs notebooks. It may be used by several goroutines.
type Service struct {
	cfg  Config
	runs *semaphore.Weighted

	mu     sync.Mutex // guards what follows
	closed error
	idle   chan struct{} // closed when closed is set and no run is left
	active map[*run]struct{}
	tokens map[string]int // runs by token
	books  map[string]*book
	clock  uint64 // grows with each use of a book
}

// New returns a Service.
func New(cfg Config) *Service {
	return &Service{cfg: cfg, runs: semaphore.NewWeighted(maxRuns), active: map[*run]struct{}{}, tokens: map[string]int{}, books: map[string]*book{}, idle: make(chan struct{})}
}

// errStopping is why runs end with the control plane.
var errStopping = proto.Errorf(proto.CodeUnavailable, "the control plane is stopping: send the cells again")

// closeTime bounds how long Close waits for runs to stop what they started.
const closeTime = 10 * time.Second

// Close ends all runs, and refuses new ones. It waits for a while until those under way have
// stopped the kernels that are theirs alone: agents must be reachable still.
func (s *Service) Close() {
	s.cut(errStopping, true, func(*run) bool { return true })
	late := time.NewTimer(closeTime)
	defer late.Stop()
	select {
	case <-s.idle:
	case <-late.C:
	}
}

// CutToken ends the runs of a token that was revoked.
func (s *Service) CutToken(id string) {
	s.cut(proto.Errorf(proto.CodeUnauthenticated, "the token was revoked"), false, func(r *run) bool { return r.caller.TokenId == id })
}

// CutOrganization ends the runs of an organization that was disabled.
func (s *Service) CutOrganization(id string) {
	s.cut(proto.Errorf(proto.CodeOrganizationDisabled, "the organization was disabled"), false, func(r *run) bool { return r.caller.Organization == id })
}

func (s *Service) cut(cause error, forGood bool, which func(*run) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if forGood && s.closed == nil {
		s.closed = cause
		if len(s.active) == 0 {
			close(s.idle)
		}
	}
	for r := range s.active {
		if which(r) {
			r.end(cause)
		}
	}
}

// enter takes a place for a run; leave gives it back.
func (s *Service) enter(r *run) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed != nil:
		return s.closed
	case s.tokens[r.caller.TokenId] >= maxOfToken:
		return proto.Errorf(proto.CodeOverloaded, "token %s has %d notebooks running: wait for one to end", r.caller.TokenName, maxOfToken)
	case !s.runs.TryAcquire(1):
		return proto.Errorf(proto.CodeOverloaded, "%d notebooks are running on this control plane: try again later", maxRuns)
	}
	s.tokens[r.caller.TokenId]++
	s.active[r] = struct{}{}
	return nil
}

func (s *Service) leave(r *run) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.active, r)
	if s.closed != nil && len(s.active) == 0 {
		close(s.idle)
	}
	if s.tokens[r.caller.TokenId]--; s.tokens[r.caller.TokenId] == 0 {
		delete(s.tokens, r.caller.TokenId)
	}
	s.runs.Release(1)
}
