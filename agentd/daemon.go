package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/agentd/audit"
	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/agentd/host"
	"github.com/postern-dev/postern/agentd/identity"
	"github.com/postern-dev/postern/agentd/kernel"
	"github.com/postern-dev/postern/agentd/link"
	"github.com/postern-dev/postern/agentd/report"
	"github.com/postern-dev/postern/agentd/secret"
	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/agentd/uplink"
	"github.com/postern-dev/postern/agentd/vault"
	"github.com/postern-dev/postern/proto/auditchain"
	"github.com/postern-dev/postern/tunnel"
)

// The parts fit where they are wired.
var (
	_ link.Identity = (*identity.Identity)(nil)
	_ host.Audit    = (*audit.Log)(nil)
)

const (
	// drainTime is how long running statements may take to end when agentd stops;
	// systemd's TimeoutStopSec is longer.
	drainTime = 25 * time.Second
	// abortTime is how long they may take after they were cancelled.
	abortTime = 3 * time.Second
)

// Daemon is a running agentd: every subsystem is a field of it. Flags or its
// places come first, then Validate, Run (once) and Close.
type Daemon struct {
	places
	// Executable is started for SQL sessions; "" means this program. For tests.
	Executable string
	// Notify tells systemd; nil does nothing.
	Notify func(state string)
	// Backoff is how the link spaces its tries; zero values are the defaults.
	Backoff tunnel.BackoffConfig
	// Tunnel holds the tunnel's knobs for tests; zero values are the defaults.
	Tunnel tunnel.Config

	logger   *slog.Logger
	level    *slog.LevelVar
	started  time.Time
	identity *identity.Identity
	secrets  *secret.Environment
	vault    *vault.Client // nil: there is none
	registry *prometheus.Registry

	log      *audit.Log
	sessions *sqlsession.Manager
	kernels  *kernel.Manager
	// checkpoints is empty until the kernels are adopted.
	checkpoints engineBox
	// kernelUIDs is the first of kernels' user ids; it stays until the next start.
	kernelUIDs uint32
	attach     *attachments
	host       *host.Host
	reports    *report.Reporter
	forward    *forward // nil: nowhere
	standing   *standing
	link       *link.Keeper
	uplinks    *uplink.Starter
	control    *control.Server
	metrics    *http.Server
	unlock     func()

	serving   sync.WaitGroup // the metrics server
	countUp   atomic.Pointer[prometheus.Counter]
	countDown atomic.Pointer[prometheus.Counter]

	config   atomic.Pointer[config.Config]
	texts    atomic.Pointer[map[string]*sqlsession.Texts] // patterns by source
	stopping atomic.Bool
	aborted  chan struct{}
	abort    sync.Once
	welcomed atomic.Bool // by the control plane, since the start
	agreed   atomic.Uint64
	closing  sync.Once
	offers   offers

	// mu guards the following.
	mu           sync.Mutex
	loaded       time.Time
	reloadError  string
	auditWarning string
}

// NewDaemon makes a daemon that logs to logger, whose level it sets.
func NewDaemon(logger *slog.Logger, level *slog.LevelVar) *Daemon {
	return &Daemon{logger: logger, level: level, started: time.Now(), aborted: make(chan struct{}), Notify: func(string) {}}
}

// Flags adds the daemon's flags to a command.
func (d *Daemon) Flags(cmd *cobra.Command) { d.flags(cmd, "config", "state", "runtime") }

// Validate reads configuration and identity and checks them. It changes nothing
// but the identity's files, where a crash left a renewal half done.
func (d *Daemon) Validate() error {
	c, found, err := d.loadConfig()
	if err != nil {
		return err
	}
	if d.identity, err = identity.Open(d.state); errors.Is(err, identity.ErrNotRegistered) {
		return fmt.Errorf("this host is not registered (no identity in %s): run agentd register --url URL", d.state)
	} else if err != nil {
		return err
	}
	if c.URL == "" {
		c.URL = d.identity.Agent().URL
	}
	if _, err := config.TunnelURL(c.URL); err != nil {
		return fmt.Errorf("the URL of the control plane: %w: set url in %s", err, d.places.config)
	}
	d.useConfig(c)
	if !found {
		d.logger.Warn("no configuration file, no data sources", "file", d.places.config)
	}
	return nil
}

func (d *Daemon) useConfig(c *config.Config) {
	d.config.Store(c)
	d.level.Set(c.Log.Level)
	d.mu.Lock()
	d.loaded, d.reloadError = time.Now(), ""
	d.mu.Unlock()
}

// Run starts everything and serves until ctx ends; then it lets running
// statements finish, for drainTime at most or until Abort, and returns. ready is
// called when the daemon answers, last; it may be nil.
func (d *Daemon) Run(ctx context.Context, ready func()) (err error) {
	defer func() { err = errors.Join(err, d.Close()) }()
	// The link outlives ctx: statements that are under way answer through it.
	linkCtx, cutLink := context.WithCancel(context.Background())
	defer cutLink()
	if err := d.open(linkCtx); err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer d.uplinks.Close() // their tunnels are closed by then
	defer wg.Wait()
	defer cutLink()
	wg.Go(func() { d.link.Run(linkCtx) })
	wg.Go(func() { d.reports.Run(linkCtx) })
	wg.Go(func() { d.log.RunRetention(linkCtx, d.retirable) })
	wg.Go(func() { d.staySmall(linkCtx) })
	wg.Go(func() { d.forward.run(linkCtx) })

	if ready != nil {
		ready()
	}
	<-ctx.Done()
	d.drain()
	return nil
}

// open starts everything but the link, which it makes. linkCtx bounds the
// watching of the network alone.
func (d *Daemon) open(linkCtx context.Context) (err error) {
	if d.unlock, err = lockState(d.state); err != nil {
		return err
	}
	c := d.config.Load()
	var found audit.Recovery
	d.log, found, err = audit.Open(d.state, audit.Config{Logger: d.logger})
	if err != nil {
		return err
	}
	d.setRetention(c)
	if found.Torn != "" {
		d.logger.Warn("half-written audit entry set aside", "file", found.Torn)
	}
	d.registry = prometheus.NewRegistry()
	d.vault = newVault(d.Executable, c, d.secrets, d.logger)
	d.sessions = sqlsession.New(sqlsession.Config{
		Executable: d.Executable, UIDBase: int(c.SQL.UIDBase), Warm: warm(c.SQL.Warm), IdleTimeout: c.SQL.IdleTimeout, Memory: int64(c.SQL.Memory),
		Hold: d.holdDir(), Logger: d.logger, Metrics: sqlsession.NewMetrics(d.registry),
	})
	if err := d.setSources(c); err != nil {
		return err
	}
	if d.standing, err = openStanding(d.state, d.identity.Agent().AgentID); err != nil {
		return err
	}
	d.kernelUIDs = c.Kernels.UIDBase
	d.kernels = d.newKernels()
	d.setKernels(c)
	d.reports = d.newReporter()
	d.forward = d.newForward(c)
	d.host = d.newHost()
	d.kernels.OnIdleStop(d.host.NoteKernelStopped)
	d.kernels.OnIdleSuspend(d.suspendIdle, d.host.NoteKernelSuspended)
	if err := d.host.Recover(found.Begun); err != nil {
		return err
	}
	if err := d.record(audit.ActionStart); err != nil {
		return err
	}
	d.resumeSessions()
	if err := d.kernels.Open(linkCtx); err != nil {
		return err
	}
	d.openCheckpoints(c.Kernels.Kernels)
	wake, err := tunnel.WatchNetwork(linkCtx)
	if err != nil {
		d.logger.Info("changes of the network are not watched", "err", err)
	}
	if err := d.newLink(wake); err != nil {
		return err
	}
	if err := d.openAttachments(); err != nil {
		return fmt.Errorf("attachments: %w", err)
	}
	if d.control, err = control.Listen(d.runtimeDir(), control.Config{Status: d.status, Check: d.checkSource, Candidate: d.checkCandidate, Mount: d.mount, Level: d.setLevel, Keys: d.keys}); err != nil {
		return err
	}
	d.registerMetrics()
	return d.listenMetrics(c)
}

// record writes an entry of the host's own.
func (d *Daemon) record(action string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	a := d.identity.Agent()
	return d.log.Append(ctx, auditchain.Entry{Action: action, Actor: "host", Agent: a.Name, Organization: a.Organization, Outcome: "done"})
}

func (d *Daemon) newLink(wake <-chan struct{}) error {
	c := d.config.Load()
	target, err := config.TunnelURL(c.URL)
	if err != nil {
		return err
	}
	knobs := d.Tunnel
	knobs.Logger, knobs.Metrics = d.logger, tunnel.NewMetrics(d.registry)
	d.uplinks = newUplinks(d.Executable, c, d.logger)
	d.link = link.New(link.Config{
		Logger: d.logger, URL: target, Proxy: c.Proxy, Carrier: d.uplinks.Carrier, Tunnel: knobs,
		Identity: d.identity, Handler: d.host, Hello: d.hello, Welcome: d.welcome, Changed: d.linkChanged, Renewed: d.renewed,
		Wake: wake, Backoff: d.Backoff,
	})
	d.registerLinkMetrics()
	return nil
}

// drain stops taking statements and waits for those under way.
func (d *Daemon) drain() {
	d.stopping.Store(true)
	d.Notify("STOPPING=1\nSTATUS=stopping")
	running := d.host.Running()
	d.logger.Info("stopping", "queries", running)
	d.link.Drain(drainTime + abortTime)
	ctx, cancel := context.WithTimeout(context.Background(), drainTime)
	defer cancel()
	stop := context.AfterFunc(ctx, d.Abort)
	defer stop()
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-d.aborted:
			cancel()
		case <-done:
		}
	})
	if err := d.host.Drain(ctx); err != nil {
		d.logger.Warn("statements cancelled", "queries", d.host.Running())
		d.host.Abort()
		ctx, cancel := context.WithTimeout(context.Background(), abortTime)
		defer cancel()
		if err := d.host.Drain(ctx); err != nil {
			d.logger.Warn("statements cut", "queries", d.host.Running())
		}
	}
	close(done)
	wg.Wait()
}

// Abort ends a drain at once.
func (d *Daemon) Abort() { d.abort.Do(func() { close(d.aborted) }) }

// Close ends what Run started, in the reverse order. Run calls it; the second
// time it does nothing.
func (d *Daemon) Close() error {
	var errs []error
	d.closing.Do(func() { errs = d.close() })
	return errors.Join(errs...)
}

func (d *Daemon) close() (errs []error) {
	if d.metrics != nil {
		errs = append(errs, d.metrics.Close())
		d.serving.Wait()
	}
	if d.control != nil {
		errs = append(errs, d.control.Close())
	}
	errs = append(errs, d.attach.close(), d.checkpoints.close())
	if d.kernels != nil {
		d.kernels.Close() // they go on without us
	}
	if d.sessions != nil {
		ctx, cancel := context.WithTimeout(context.Background(), abortTime)
		if err := d.sessions.Close(ctx); err != nil {
			d.logger.Warn("sql sessions killed", "err", err)
		}
		cancel()
	}
	if d.vault != nil {
		if err := d.vault.Close(); err != nil {
			d.logger.Warn("leases not revoked: they end by themselves", "err", err)
		}
	}
	if d.log != nil {
		if d.control != nil { // it had started
			if err := d.record("host.stop"); err != nil {
				d.logger.Error("stop not recorded", "err", err)
			}
		}
		errs = append(errs, d.log.Close())
	}
	if d.unlock != nil {
		d.unlock()
	}
	return errs
}

// Reload reads the configuration again. A bad file changes nothing.
func (d *Daemon) Reload() error {
	old := d.config.Load()
	c, _, err := d.loadConfig()
	if err != nil {
		d.mu.Lock()
		d.reloadError = err.Error()
		d.mu.Unlock()
		d.logger.Error("configuration not reloaded, the old one stays in force", "err", err)
		return err
	}
	if c.URL == "" {
		c.URL = d.identity.Agent().URL
	}
	if err := d.setSources(c); err != nil {
		d.mu.Lock()
		d.reloadError = err.Error()
		d.mu.Unlock()
		d.logger.Error("configuration not reloaded, the old one stays in force", "err", err)
		return err
	}
	d.useConfig(c)
	d.setRetention(c)
	d.setKernels(c)
	if err := d.record("config.reload"); err != nil {
		d.logger.Error("reload not recorded", "err", err)
	}
	d.logger.Info("configuration reloaded", "file", c.File, "sources", len(c.Sources))
	if later := c.NeedRestart(old); len(later) > 0 {
		d.logger.Warn("changed keys that need a restart of agentd", "keys", later)
	}
	d.updateInventory()
	return nil
}

// newLogger makes the daemon's logger.
func newLogger(format string, level *slog.LevelVar, w *os.File) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	if os.Getenv("JOURNAL_STREAM") != "" { // the journal has the time itself
		options.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}
	}
	return slog.New(slog.NewTextHandler(w, options))
}

func warm(n int) int {
	if n == 0 {
		return -1
	}
	return n
}
