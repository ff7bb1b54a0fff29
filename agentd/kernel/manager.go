package kernel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	gproto "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/agentd/kernel/internal/shim"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Times that things may take.
const (
	spawnTime = 90 * time.Second // a shim's start, with its kernel's
	stopTime  = 40 * time.Second
	idlePause = 15 * time.Second // between two looks for idle kernels
	maxPause  = 30 * time.Second // between two tries to start a shim anew
)

// stopMark is a file in the directory of a kernel that is being stopped: agentd
// finishes that at its next start.
const stopMark = "stopping"

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
}

// Start is a wish for a kernel that the policy allowed.
type Start struct {
	ID          string
	Spec        string
	Owner       *posternv1.Principal
	Environment map[string]string
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

	// Guarded by Manager.mu.
	spec     shim.Spec
	last     *posternv1.Kernel
	lost     string // why its shim does not answer
	stopping bool
	process  *os.Process
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
	m := &Manager{cfg: cfg, logger: cfg.Logger, kernels: map[string]*kernel{}, uids: map[uint32]bool{}, refill: make(chan struct{}, 1)}
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

// suspendAgain is how long an idle kernel that could not be suspended is let be.
const suspendAgain = 10 * time.Minute

// suspendIdle suspends a kernel that nobody used.
func (m *Manager) suspendIdle(k *posternv1.Kernel, after time.Duration) {
	if m.suspend == nil || time.Since(m.refused[k.Id]) < suspendAgain {
		return
	}
	if err := m.suspend(m.ctx, k); err != nil {
		if m.refused == nil {
			m.refused = map[string]time.Time{}
		}
		m.refused[k.Id] = time.Now()
		m.logger.Warn("idle kernel not suspended: it goes on", "kernel", k.Id, "err", err)
		return
	}
	delete(m.refused, k.Id)
	m.logger.Info("idle kernel suspended", "kernel", k.Id, "after", after)
	if m.gone != nil {
		m.gone(k, fmt.Sprintf("nobody used it for %s", after))
	}
}

// Set makes settings count from now on.
func (m *Manager) Set(s Settings) {
	m.mu.Lock()
	m.settings = s
	m.mu.Unlock()
	m.wake()
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
	return nil
}

func (m *Manager) newKernel(dir string, s shim.Spec) *kernel {
	return &kernel{dir: dir, spec: s, agent: shim.NewAgent(dir), ready: make(chan struct{}), tended: make(chan struct{}), cancel: func() {}}
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

var idForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// Start starts a kernel, or takes one that waits. It returns when the kernel's processes
// run. A second call with one id is the same kernel's, if the owner is the same.
func (m *Manager) Start(ctx context.Context, r Start) (*posternv1.Kernel, error) {
	began := time.Now()
	if !idForm.MatchString(r.ID) {
		return nil, proto.Errorf(proto.CodeInvalid, "the kernel's id is no UUID")
	}
	m.mu.Lock()
	s := m.settings
	m.mu.Unlock()
	if !s.Enabled {
		return nil, proto.Errorf(proto.CodePolicyDenied, "kernels are off on this host: add kernels: to agentd.yaml")
	}
	sp, err := m.spec(s, r.Spec)
	if err != nil {
		return nil, err
	}
	owner, err := protojson.Marshal(r.Owner)
	if err != nil {
		return nil, err
	}
	trial := m.build(s, sp, s.UIDBase, r.ID, r.Environment).Sandbox
	if err := trial.Validate(); err != nil {
		return nil, proto.Errorf(proto.CodeInvalid, "kernels of spec %s cannot run here: %v", sp.name, err)
	}
	m.mu.Lock()
	if k := m.kernels[r.ID]; k != nil {
		m.mu.Unlock()
		return m.again(ctx, k, r)
	}
	if len(m.kernels) >= s.Max {
		m.mu.Unlock()
		return nil, proto.Errorf(proto.CodeOverloaded, "this host has %d kernels, as many as kernels.max lets it: stop one, or raise it in agentd.yaml", s.Max)
	}
	var k *kernel
	warm := false
	if len(r.Environment) == 0 {
		for i, w := range m.pool {
			if w.spec.Name == sp.name && w.last != nil && w.last.State == posternv1.KernelState_KERNEL_STATE_IDLE && w.lost == "" && !w.stopping {
				k, warm = w, true
				m.pool = slices.Delete(m.pool, i, i+1)
				break
			}
		}
	}
	if k == nil {
		uid, ok := m.uidLocked(s)
		if !ok {
			m.mu.Unlock()
			return nil, proto.Errorf(proto.CodeOverloaded, "no user id is left for a kernel: raise kernels.max's range")
		}
		k = m.newKernel(filepath.Join(m.cfg.Dir, r.ID), m.build(s, sp, uid, r.ID, r.Environment))
	}
	k.spec.ID, k.spec.Owner, k.spec.Created = r.ID, owner, time.Now().UTC()
	spec := k.spec
	m.kernels[r.ID] = k
	m.mu.Unlock()

	if warm {
		err = m.claim(ctx, k, spec)
	} else {
		err = m.launch(ctx, k, spec)
	}
	if err != nil {
		m.cfg.Metrics.started("failed", warm, time.Since(began))
		if !warm {
			k.failed = err
			close(k.ready)
		}
		m.forget(k)
		return nil, err
	}
	if !warm {
		close(k.ready)
	}
	m.wake()
	m.cfg.Metrics.started("done", warm, time.Since(began))
	return m.Get(ctx, r.ID)
}

// again is a second start of a kernel that is there.
func (m *Manager) again(ctx context.Context, k *kernel, r Start) (*posternv1.Kernel, error) {
	select {
	case <-k.ready:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if k.failed != nil {
		return nil, k.failed
	}
	out, err := m.Get(ctx, r.ID)
	if err != nil {
		return nil, err
	}
	if out.Owner.GetTokenId() != r.Owner.GetTokenId() || out.Owner.GetOrganization() != r.Owner.GetOrganization() {
		return nil, proto.Errorf(proto.CodeAlreadyExists, "kernel %s is another's", r.ID)
	}
	return out, nil
}

// spec finds a kernelspec; an empty name is the default one.
func (m *Manager) spec(s Settings, name string) (spec, error) {
	found, wrong := findSpecs(s.SpecDirs)
	if name == "" {
		name = "python3"
	}
	for _, sp := range found {
		if sp.name == strings.ToLower(name) {
			return sp, nil
		}
	}
	for path, err := range wrong {
		if strings.EqualFold(filepath.Base(path), name) {
			return spec{}, proto.Errorf(proto.CodeNotFound, "kernelspec %.64q cannot be used: %v", name, err)
		}
	}
	return spec{}, proto.Errorf(proto.CodeNotFound, "this host has no kernelspec %.64q: install it, or see kernels.spec_dirs in agentd.yaml", name)
}

// build is what a new kernel is.
func (m *Manager) build(s Settings, sp spec, uid uint32, slot string, env map[string]string) shim.Spec {
	out := shim.Spec{
		Name: sp.name, Language: sp.file.Language, InterruptMode: sp.file.InterruptMode, JournalBytes: s.JournalBytes, Created: time.Now().UTC(),
		Sandbox: sandbox.Spec{
			ID: slot, UID: uid, GID: uid, Argv: sp.argv(), Visible: append(sp.visible(), s.Visible...),
			Limits:  sandbox.Limits{Memory: s.Memory, CPU: s.CPUs, PIDs: s.PIDs, Disk: s.Disk},
			Network: sandbox.Network{Mode: sandbox.NetworkMode(s.Network), Allow: s.NetworkAllow},
		},
	}
	all := map[string]string{}
	for name, value := range sp.file.Env {
		all[name] = value
	}
	for name, value := range env {
		all[name] = value
	}
	m.bringModule(sp, &out.Sandbox, all)
	for name, value := range all {
		out.Sandbox.Env = append(out.Sandbox.Env, name+"="+value)
	}
	slices.Sort(out.Sandbox.Env)
	out.Places(filepath.Join(m.cfg.Dir, slot))
	return out
}

func (m *Manager) uidLocked(s Settings) (uint32, bool) {
	for uid := s.UIDBase; uid < s.UIDBase+s.UIDs; uid++ {
		if !m.uids[uid] {
			m.uids[uid] = true
			return uid, true
		}
	}
	return 0, false
}

// launch makes a kernel's directory and starts its shim.
func (m *Manager) launch(ctx context.Context, k *kernel, s shim.Spec) error {
	if err := os.Mkdir(k.dir, 0o700); err != nil {
		close(k.tended)
		return fmt.Errorf("kernel's directory: %w", err)
	}
	if err := shim.WriteSpec(k.dir, s); err != nil {
		close(k.tended)
		return err
	}
	if err := m.spawn(ctx, k); err != nil {
		close(k.tended)
		return proto.Errorf(proto.CodeInternal, "start the kernel: %v", err)
	}
	first, err := k.agent.Kernel(ctx)
	if err == nil && first.State == posternv1.KernelState_KERNEL_STATE_DEAD {
		err = proto.Errorf(proto.CodeUnavailable, "%s", first.Reason)
	}
	if err != nil {
		close(k.tended)
		return err
	}
	m.mu.Lock()
	k.last = first
	m.mu.Unlock()
	m.tend(k)
	return nil
}

// spawn starts a shim, which may start, adopt or find dead its kernel.
func (m *Manager) spawn(ctx context.Context, k *kernel) error {
	ctx, cancel := context.WithTimeout(ctx, spawnTime)
	defer cancel()
	p, err := shim.Spawn(ctx, m.cfg.Executable, k.dir)
	if err != nil {
		return err
	}
	m.mu.Lock()
	k.process = p
	m.mu.Unlock()
	return nil
}

// claim gives a kernel of the pool to its owner.
func (m *Manager) claim(ctx context.Context, k *kernel, s shim.Spec) error {
	if err := shim.WriteSpec(k.dir, s); err != nil {
		return err
	}
	now, err := k.agent.Reread(ctx)
	if err != nil {
		return proto.Errorf(proto.CodeUnavailable, "a kernel that waited did not answer: try again (%v)", err)
	}
	m.mu.Lock()
	k.last = now
	m.mu.Unlock()
	return nil
}

// tend looks after a kernel's shim until the kernel is stopped or agentd ends: one that
// died is started again, and adopts the kernel.
func (m *Manager) tend(k *kernel) {
	ctx, cancel := context.WithCancel(m.ctx)
	k.cancel = cancel
	if m.cfg.SQL != nil {
		m.wg.Go(func() { m.serveSQL(ctx, k) })
	}
	m.wg.Go(func() {
		defer close(k.tended)
		defer cancel()
		pause := time.Duration(0)
		for ctx.Err() == nil {
			err := k.agent.Watch(ctx, func(now *posternv1.Kernel) {
				pause = 0
				m.mu.Lock()
				idle := k.last == nil || k.last.State != now.State
				k.last, k.lost = now, ""
				m.mu.Unlock()
				if idle {
					m.wake()
				}
			})
			if ctx.Err() != nil {
				return
			}
			m.mu.Lock()
			stopping, process := k.stopping, k.process
			k.process = nil
			k.lost = "its shim is being replaced"
			m.mu.Unlock()
			if stopping {
				if process != nil {
					_, _ = process.Wait()
				}
				return
			}
			if !errors.Is(err, shim.ErrNoShim) || process != nil {
				m.logger.Warn("a kernel's shim ended, starting another", "kernel", k.spec.ID, "err", err)
				m.cfg.Metrics.shims.Inc()
			}
			if process != nil {
				_ = process.Kill() // one that does not answer gives way; its kernel stays
				_, _ = process.Wait()
			}
			timer := time.NewTimer(pause)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return
			}
			pause = min(max(2*pause, 100*time.Millisecond), maxPause)
			if err := m.spawn(ctx, k); err != nil && ctx.Err() == nil {
				m.logger.Error("a kernel's shim cannot be started", "kernel", k.spec.ID, "dir", k.dir, "err", err)
				m.mu.Lock()
				k.lost = "its shim cannot be started: " + err.Error()
				m.mu.Unlock()
			}
		}
	})
}

// forget ends a kernel whose start failed.
func (m *Manager) forget(k *kernel) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(m.ctx), stopTime)
	defer cancel()
	if err := m.end(ctx, k); err != nil {
		m.logger.Error("remains of a kernel that did not start", "dir", k.dir, "err", err)
	}
	m.mu.Lock()
	delete(m.kernels, k.spec.ID)
	m.mu.Unlock()
}

// find finds a kernel that has started.
func (m *Manager) find(ctx context.Context, id string) (*kernel, error) {
	m.mu.Lock()
	k := m.kernels[id]
	m.mu.Unlock()
	if k == nil {
		return nil, proto.Errorf(proto.CodeNotFound, "this host has no kernel %.64q", id)
	}
	select {
	case <-k.ready:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if k.failed != nil {
		return nil, proto.Errorf(proto.CodeNotFound, "kernel %s did not start", id)
	}
	return k, nil
}

// Get is a kernel as it is.
func (m *Manager) Get(ctx context.Context, id string) (*posternv1.Kernel, error) {
	k, err := m.find(ctx, id)
	if err != nil {
		return nil, err
	}
	short, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if now, err := k.agent.Kernel(short); err == nil {
		return now, nil
	}
	return m.known(k), nil
}

// known is a kernel as it was when its shim last spoke.
func (m *Manager) known(k *kernel) *posternv1.Kernel {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out *posternv1.Kernel
	if k.last != nil {
		out, _ = gproto.Clone(k.last).(*posternv1.Kernel)
	} else {
		out = &posternv1.Kernel{Spec: k.spec.Name, Language: k.spec.Language, State: posternv1.KernelState_KERNEL_STATE_CHANGING, Started: timestamppb.New(k.spec.Created)}
		owner := &posternv1.Principal{}
		if protojson.Unmarshal(k.spec.Owner, owner) == nil {
			out.Owner = owner
		}
	}
	out.Id = k.spec.ID
	if k.lost != "" {
		out.State, out.Reason = posternv1.KernelState_KERNEL_STATE_CHANGING, k.lost
	}
	return out
}

// List is all kernels, by id, as their shims last told.
func (m *Manager) List() []*posternv1.Kernel {
	m.mu.Lock()
	var all []*kernel
	for _, k := range m.kernels {
		all = append(all, k)
	}
	m.mu.Unlock()
	var out []*posternv1.Kernel
	for _, k := range all {
		select {
		case <-k.ready:
		default: // it is being started
		}
		out = append(out, m.known(k))
	}
	slices.SortFunc(out, func(a, b *posternv1.Kernel) int { return strings.Compare(a.Id, b.Id) })
	return out
}

// Interrupt returns when the interrupt has been delivered.
func (m *Manager) Interrupt(ctx context.Context, id string) (*posternv1.Kernel, error) {
	return m.ask(ctx, id, (*shim.Agent).Interrupt)
}

// Restart ends the kernel's processes and starts them anew.
func (m *Manager) Restart(ctx context.Context, id string) (*posternv1.Kernel, error) {
	return m.ask(ctx, id, (*shim.Agent).Restart)
}

func (m *Manager) ask(ctx context.Context, id string, what func(*shim.Agent, context.Context) (*posternv1.Kernel, error)) (*posternv1.Kernel, error) {
	k, err := m.find(ctx, id)
	if err != nil {
		return nil, err
	}
	now, err := what(k.agent, ctx)
	if errors.Is(err, shim.ErrNoShim) || errors.Is(err, io.EOF) {
		return nil, proto.Errorf(proto.CodeUnavailable, "kernel %s: its shim is being replaced: try again", id)
	}
	return now, err
}

// Stop ends a kernel and removes what it had on the host.
func (m *Manager) Stop(ctx context.Context, id string) error {
	k, err := m.find(ctx, id)
	if err != nil {
		return err
	}
	// What was begun is finished, whoever hangs up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
	defer cancel()
	if err := m.end(ctx, k); err != nil {
		return err
	}
	m.mu.Lock()
	if m.kernels[id] == k {
		delete(m.kernels, id)
	}
	m.mu.Unlock()
	return nil
}

// end ends a kernel, its shim and its directory.
func (m *Manager) end(ctx context.Context, k *kernel) error {
	m.mu.Lock()
	again := k.stopping
	k.stopping = true
	m.mu.Unlock()
	if _, err := os.Stat(k.dir); errors.Is(err, fs.ErrNotExist) {
		k.cancel()
		m.release(k)
		return nil
	}
	undo := func(err error) error {
		if !again {
			m.mu.Lock()
			k.stopping = false
			m.mu.Unlock()
		}
		return err
	}
	mark, err := os.OpenFile(filepath.Join(k.dir, stopMark), os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		err = mark.Close()
	}
	if err != nil {
		m.logger.Warn("a stop not marked", "dir", k.dir, "err", err) // a full disk does not stop it
	}
	err = k.agent.Stop(ctx)
	if err != nil && !errors.Is(err, shim.ErrNoShim) && !errors.Is(err, io.EOF) {
		return undo(fmt.Errorf("stop kernel: %w", err))
	}
	k.cancel()
	<-k.tended
	m.mu.Lock()
	process := k.process
	k.process = nil
	m.mu.Unlock()
	if process != nil {
		stop := context.AfterFunc(ctx, func() { _ = process.Kill() })
		_, _ = process.Wait()
		stop()
	}
	if err := sandbox.Cleanup(ctx, k.spec.Sandbox); err != nil {
		return undo(fmt.Errorf("clean up after the kernel: %w", err))
	}
	if err := m.remove(k.dir); err != nil {
		return undo(err)
	}
	m.release(k)
	return nil
}

func (m *Manager) release(k *kernel) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.uids, k.spec.Sandbox.UID)
}

// remove removes a kernel's directory, never through a mount.
func (m *Manager) remove(dir string) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && (f[4] == dir || strings.HasPrefix(f[4], dir+"/")) {
			return fmt.Errorf("something is still mounted at %s: unmount it", f[4])
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove the kernel's files: %w", err)
	}
	return nil
}

// Channels opens a kernel's channels: the stream is the caller's, of package
// kernelstream. ctx bounds the opening alone.
func (m *Manager) Channels(ctx context.Context, r *posternv1.KernelChannelsRequest) (io.ReadWriteCloser, error) {
	k, err := m.find(ctx, r.KernelId)
	if err != nil {
		return nil, err
	}
	stream, err := kernelstream.Dial(ctx, k.agent, r)
	if errors.Is(err, shim.ErrNoShim) || errors.Is(err, io.EOF) {
		return nil, proto.Errorf(proto.CodeUnavailable, "kernel %s: its shim is being replaced: try again", r.KernelId)
	}
	return stream, err
}

// keep fills the pool and ends idle kernels.
func (m *Manager) keep() {
	tick := time.NewTicker(idlePause)
	defer tick.Stop()
	failures := map[string]time.Time{}
	for {
		m.fill(failures)
		select {
		case <-m.ctx.Done():
			return
		case <-m.refill:
		case <-tick.C:
			m.endIdle(time.Now())
		}
	}
}

// fill starts what the pool lacks and ends what it has too much, one at a time.
func (m *Manager) fill(failures map[string]time.Time) {
	m.mu.Lock()
	s := m.settings
	m.mu.Unlock()
	var wanted []spec
	if s.Enabled && s.Warm > 0 {
		found, _ := findSpecs(s.SpecDirs)
		for _, sp := range found {
			if s.Offered == nil || s.Offered(sp.name) {
				wanted = append(wanted, sp)
			}
		}
	}
	have := map[string]int{}
	m.mu.Lock()
	var surplus []*kernel
	m.pool = slices.DeleteFunc(m.pool, func(k *kernel) bool {
		good := slices.ContainsFunc(wanted, func(sp spec) bool { return sp.name == k.spec.Name }) && have[k.spec.Name] < s.Warm
		good = good && (k.last == nil || k.last.State != posternv1.KernelState_KERNEL_STATE_DEAD)
		if good {
			have[k.spec.Name]++
		} else {
			surplus = append(surplus, k)
			failures[k.spec.Name] = time.Now()
		}
		return !good
	})
	m.mu.Unlock()
	for _, k := range surplus {
		ctx, cancel := context.WithTimeout(m.ctx, stopTime)
		if err := m.end(ctx, k); err != nil && m.ctx.Err() == nil {
			m.logger.Error("waiting kernel not ended", "dir", k.dir, "err", err)
		}
		cancel()
	}
	for _, sp := range wanted {
		for have[sp.name] < s.Warm && m.ctx.Err() == nil && time.Since(failures[sp.name]) > maxPause {
			m.mu.Lock()
			uid, ok := m.uidLocked(s)
			m.mu.Unlock()
			if !ok {
				return
			}
			slot := jupyter.NewID()
			k := m.newKernel(filepath.Join(m.cfg.Dir, slot), m.build(s, sp, uid, slot, nil))
			err := m.launch(m.ctx, k, k.spec)
			close(k.ready)
			if err != nil {
				if m.ctx.Err() == nil {
					m.logger.Warn("no kernel could be started to wait", "spec", sp.name, "err", err)
				}
				failures[sp.name] = time.Now()
				m.forget(k)
				break
			}
			m.mu.Lock()
			m.pool = append(m.pool, k)
			m.mu.Unlock()
			have[sp.name]++
		}
	}
}

// endIdle stops kernels that nobody used for longer than the policy keeps them.
func (m *Manager) endIdle(now time.Time) {
	m.mu.Lock()
	after, suspend := m.settings.IdleAfter, m.settings.IdleSuspend
	m.mu.Unlock()
	if after == 0 {
		return
	}
	for _, k := range m.List() {
		quiet := k.State == posternv1.KernelState_KERNEL_STATE_IDLE || k.State == posternv1.KernelState_KERNEL_STATE_DEAD
		if !quiet || k.Connections > 0 || now.Sub(k.LastActivity.AsTime()) < after {
			continue
		}
		// It may have been used since its shim told last.
		current, err := m.Get(m.ctx, k.Id)
		if err != nil || current.State != k.State || current.Connections > 0 || now.Sub(current.LastActivity.AsTime()) < after {
			continue
		}
		if suspend {
			if current.State == posternv1.KernelState_KERNEL_STATE_IDLE {
				m.suspendIdle(current, after)
			}
			continue
		}
		m.logger.Info("idle kernel stopped", "kernel", k.Id, "after", after)
		if err := m.Stop(m.ctx, k.Id); err != nil {
			m.logger.Error("idle kernel not stopped", "kernel", k.Id, "err", err)
			continue
		}
		if m.stopped != nil {
			m.stopped(current, fmt.Sprintf("nobody used it for %s", after))
		}
	}
}

// Waiting is how many kernels of the pool are ready to be taken.
func (m *Manager) Waiting() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for _, k := range m.pool {
		if k.last != nil && k.last.State == posternv1.KernelState_KERNEL_STATE_IDLE {
			n++
		}
	}
	return n
}
