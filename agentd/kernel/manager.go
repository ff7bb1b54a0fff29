package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/postern-dev/postern/agentd/kernel/internal/shim"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Times that things may take.
const (
	spawnTime = 90 * time.Second // a shim's start, with its kernel's
	stopTime  = 40 * time.Second
	idlePause = 15 * time.Second // between two looks for idle kernels
	maxPause  = 30 * time.Second // between two tries to start a shim anew
)

// Config is what a Manager needs.
type Config struct {
	// Dir is where kernels are: a directory each. It is made (0700).
	Dir string
	// Executable is agentd; empty means this program.
	Executable string
	Logger     *slog.Logger // nil discards
	Metrics    *Metrics     // nil keeps none
	// SQL answers kernels that ask for rows of data sources; nil: they can't ask.
	SQL SQL
	// ModuleDir is where the Python module for that is put, for all to read.
	ModuleDir string
	// SecretsKeyFile seals what kernels have of secrets, in their directories; it is made
	// (0600) when it is needed first. Empty: kernels can't have any.
	SecretsKeyFile string
	// ReadSecret reads one of the host's own secrets; nil: there are none.
	ReadSecret func(ctx context.Context, name string) ([]byte, error)
	// SecretsChanged is told of what the host changed by itself; nil: nobody is.
	SecretsChanged SecretsChanged
}

// Settings are what of the host's configuration new kernels follow; those that run keep
// theirs, but for IdleAfter, Max and Warm.
type Settings struct {
	// Enabled: false starts none. Kernels that run go on.
	Enabled bool
	// SpecDirs are where kernelspecs are; nil: Jupyter's system directories.
	SpecDirs []string
	// Offered decides whether kernels of a spec may be there; nil: all.
	Offered func(spec string) bool
	// Max kernels at once, those in the pool not counted; a dead kernel counts until it
	// is stopped.
	Max int
	// Memory and Disk (bytes), CPUs and PIDs bound each; 0: no bound.
	Memory, Disk int64
	CPUs         float64
	PIDs         int64
	Network      string
	NetworkAllow []string
	Visible      []string
	// IdleAfter ends kernels with nobody attached and nothing to do for so long; 0: none.
	IdleAfter time.Duration
	// IdleSuspend suspends them instead. One that can't be goes on; it is tried again later.
	IdleSuspend bool
	// Warm kernels of each spec wait, started.
	Warm int
	// JournalBytes bounds each journal.
	JournalBytes int64
	// UIDBase is the first user id, of UIDs.
	UIDBase, UIDs uint32
	// SecretAllowed returns why kernels may not have a secret, empty if they may; nil: all
	// may be had. What it forbids is taken from kernels that have it.
	SecretAllowed func(name string, fromHost bool) string
}

// Manager starts, finds and stops kernels. It may be used by several goroutines. Close
// leaves the kernels running.
type Manager struct {
	cfg    Config
	logger *slog.Logger
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	refill chan struct{}
	revise chan struct{} // has keepSecrets look now
	// secretsKey guards the key's file.
	secretsKey sync.Mutex

	// mu guards the following; held for memory alone.
	mu       sync.Mutex
	settings Settings
	kernels  map[string]*kernel // by id
	pool     []*kernel
	uids     map[uint32]bool
	stopped  func(k *posternv1.Kernel, reason string)
	suspend  func(ctx context.Context, k *posternv1.Kernel) error
	gone     func(k *posternv1.Kernel, reason string)
	// refused is when an idle kernel could not be suspended; only keep uses it.
	refused map[string]time.Time
}

// kernel is one of a host.
type kernel struct {
	dir   string
	agent *shim.Agent
	// ready is closed when its start has ended, failed says how.
	ready  chan struct{}
	failed error
	cancel context.CancelFunc
	tended chan struct{} // closed when nobody looks after its shim any more
	// revoked ends when its owner may ask for nothing any more; revoke ends it, with why.
	revoked context.Context
	revoke  context.CancelCauseFunc
	// secrets is taken before Manager.mu.
	secrets secretsLock

	// Guarded by Manager.mu.
	spec     shim.Spec
	last     *posternv1.Kernel
	lost     string // why its shim does not answer
	stopping bool
	process  *os.Process
	owed     bool // its shim was not told of its newest secrets
}

// New makes a Manager; Open comes next.
func New(cfg Config) *Manager {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Executable == "" {
		cfg.Executable = "/proc/self/exe"
	}
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics(nil)
	}
	m := &Manager{cfg: cfg, logger: cfg.Logger, kernels: map[string]*kernel{}, uids: map[uint32]bool{}, refill: make(chan struct{}, 1), revise: make(chan struct{}, 1)}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m
}

// OnIdleStop is called when an idle kernel was stopped by the policy, before Open.
func (m *Manager) OnIdleStop(f func(k *posternv1.Kernel, reason string)) { m.stopped = f }

// OnIdleSuspend gives what suspends an idle kernel, and what is called when it was, before
// Open.
func (m *Manager) OnIdleSuspend(suspend func(context.Context, *posternv1.Kernel) error, told func(k *posternv1.Kernel, reason string)) {
	m.suspend, m.gone = suspend, told
}

// Set makes settings count from now on.
func (m *Manager) Set(s Settings) {
	m.mu.Lock()
	m.settings = s
	m.mu.Unlock()
	m.wake()
	select {
	case m.revise <- struct{}{}:
	default:
	}
}

func (m *Manager) wake() {
	select {
	case m.refill <- struct{}{}:
	default:
	}
}

// Open adopts the kernels that an earlier agentd left, ends what it left half done, and
// begins to look after all. A kernel that cannot be adopted is told as such, never
// removed.
func (m *Manager) Open(ctx context.Context) error {
	if err := os.MkdirAll(m.cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("kernels: %w", err)
	}
	entries, err := os.ReadDir(m.cfg.Dir)
	if err != nil {
		return fmt.Errorf("kernels: %w", err)
	}
	for _, e := range entries {
		dir := filepath.Join(m.cfg.Dir, e.Name())
		if !e.IsDir() {
			continue
		}
		s, err := shim.ReadSpec(dir)
		if errors.Is(err, fs.ErrNotExist) {
			// It died before anything was started there.
			if err := m.remove(dir); err != nil {
				m.logger.Error("half-made kernel not removed", "dir", dir, "err", err)
			}
			continue
		}
		if err != nil {
			m.logger.Error("kernel not adopted", "dir", dir, "err", err)
			continue
		}
		m.tidy(dir)
		k := m.newKernel(dir, s)
		_, err = os.Stat(filepath.Join(dir, stopMark))
		m.mu.Lock()
		m.uids[s.Sandbox.UID] = true
		m.mu.Unlock()
		if err == nil || s.ID == "" {
			// It was being stopped, or waited in the pool: new ones follow the configuration.
			close(k.ready)
			close(k.tended)
			if err := m.end(ctx, k); err != nil {
				m.logger.Error("kernel of an earlier agentd not ended", "dir", dir, "err", err)
			}
			continue
		}
		m.mu.Lock()
		m.kernels[s.ID] = k
		m.mu.Unlock()
		close(k.ready)
		m.tend(k)
	}
	m.mu.Lock()
	var adopted []*kernel
	for _, k := range m.kernels {
		adopted = append(adopted, k)
	}
	m.mu.Unlock()
	// An agentd that died in the midst of a suspend left its kernel stopped.
	m.wg.Go(func() {
		for _, k := range adopted {
			ctx, cancel := context.WithTimeout(m.ctx, 10*time.Second)
			if err := k.agent.GoOn(ctx); err != nil && m.ctx.Err() == nil && !errors.Is(err, shim.ErrNoShim) {
				m.logger.Warn("kernel that was being suspended: not told to go on", "dir", k.dir, "err", err)
			}
			cancel()
		}
	})
	m.wg.Go(m.keep)
	if m.cfg.SecretsKeyFile != "" {
		m.wg.Go(m.keepSecrets)
	}
	return nil
}

func (m *Manager) newKernel(dir string, s shim.Spec) *kernel {
	k := &kernel{dir: dir, spec: s, agent: shim.NewAgent(dir), ready: make(chan struct{}), tended: make(chan struct{}), cancel: func() {}}
	k.revoked, k.revoke = context.WithCancelCause(context.Background())
	if _, err := os.Lstat(filepath.Join(dir, revokedMark)); err == nil {
		k.revoke(errRevoked)
	}
	return k
}

// Close leaves all kernels running, those of the pool too.
func (m *Manager) Close() {
	m.cancel()
	m.wg.Wait()
}

// Specs are the kernelspecs that the host offers.
func (m *Manager) Specs() *posternv1.ListKernelSpecsResponse {
	m.mu.Lock()
	s := m.settings
	m.mu.Unlock()
	out := &posternv1.ListKernelSpecsResponse{}
	if !s.Enabled {
		return out
	}
	found, wrong := findSpecs(s.SpecDirs)
	for path, err := range wrong {
		m.logger.Warn("kernelspec left out", "path", path, "err", err)
	}
	for _, sp := range found {
		if s.Offered != nil && !s.Offered(sp.name) {
			continue
		}
		out.Specs = append(out.Specs, sp.proto())
		if out.Default == "" || sp.name == "python3" {
			out.Default = sp.name
		}
	}
	return out
}
