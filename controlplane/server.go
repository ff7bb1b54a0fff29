package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/postern-dev/postern/controlplane/api"
	"github.com/postern-dev/postern/controlplane/audit"
	"github.com/postern-dev/postern/controlplane/blob"
	"github.com/postern-dev/postern/controlplane/budget"
	"github.com/postern-dev/postern/controlplane/catalog"
	"github.com/postern-dev/postern/controlplane/filekey"
	"github.com/postern-dev/postern/controlplane/hub"
	"github.com/postern-dev/postern/controlplane/jupyter"
	"github.com/postern-dev/postern/controlplane/kernel"
	"github.com/postern-dev/postern/controlplane/notebook"
	"github.com/postern-dev/postern/controlplane/pgwire"
	"github.com/postern-dev/postern/controlplane/pki"
	"github.com/postern-dev/postern/controlplane/query"
	"github.com/postern-dev/postern/controlplane/ratelimit"
	"github.com/postern-dev/postern/controlplane/registration"
	"github.com/postern-dev/postern/controlplane/secret"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/controlplane/token"
	"github.com/postern-dev/postern/controlplane/workspace"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/syslog"
	"github.com/postern-dev/postern/tunnel"
)

// Rates, each a bucket for one key: how many a second, and how many at once.
const (
	requestRate, requestBurst = 100, 200 // of one API token
	failureRate, failureBurst = 20, 100  // failed authentications of one address, maybe a proxy's
	joinRate, joinBurst       = 2, 200   // failed joins of one address, likewise
	renewRate, renewBurst     = 0.01, 20 // renewals of one agent
	cancelRate, cancelBurst   = 0.2, 20  // PostgreSQL's cancel requests of one address that fit no session
)

// rowsOfQueries is the purpose for which the rows kept of queries are sealed.
const rowsOfQueries = "rows of queries"

const (
	// readHeaderTimeout bounds a request's header, also of connections that say
	// nothing at all.
	readHeaderTimeout = 10 * time.Second
	idleTimeout       = 75 * time.Second
	maxHeader         = 64 << 10
	// recheckEvery is how soon another replica's revocations bite here.
	recheckEvery = 500 * time.Millisecond
	// clockSlack is how far apart the replicas' clocks may be for that.
	clockSlack = 10 * time.Second
	// housekeepEvery is how often the store is told who is online.
	housekeepEvery = 30 * time.Second
)

// bodyBudget bounds what the requests of agents, and those of users, take together while they are read: a request may
// have 48 MiB, one peer's 64 MiB, all of them 192 MiB.
var bodyBudget = budget.Config{Total: 192 << 20, Each: 64 << 20, Largest: 48 << 20, Wait: 30 * time.Second, Read: 2 * time.Minute}

// Server is the whole control plane; one field for each part.
type Server struct {
	options Options
	log     *slog.Logger
	replica string // the name of this control plane among those on the same database

	store    *store.Store
	ca       *pki.Authority
	tokens   *token.Service
	joins    *registration.Service
	audit    *audit.Log
	hub      *hub.Hub
	queries  *query.Runner
	reports  *query.Reports
	sessions *sessionCloser
	journal  *query.Journal
	pg       *pgwire.Server
	catalogs *catalog.Service
	kernels  *kernel.Service
	secrets  *secret.Service
	jupyter  *jupyter.Server
	blobs    *blob.Store
	fileKeys *filekey.Service
	masters  *masterRotation
	// blobAway: the object store did not answer at the start.
	blobAway  bool
	files     *workspace.Service
	notebooks *notebook.Service
	tunnels   *tunnel.Server
	events    *linkEvents
	forwarder *syslog.Forwarder // nil: nowhere
	replicas  *replicas         // nil without --peer-listen: this is the only control plane
	api       *api.API
	http      *http.Server

	lock       *os.File // held on DATA for as long as this runs
	listener   *drainingListener
	pgListener net.Listener // nil without --pg-listen
	// draining is set when the stop begins, refusing when nothing new may begin; alone
	// in its installation, a control plane refuses at once.
	draining, refusing atomic.Bool
}

// NewServer opens the store and the CA and listens. Run serves; if Run is not
// called, Close must be.
func NewServer(ctx context.Context, o Options, log *slog.Logger) (*Server, error) {
	s := &Server{options: o, log: log}
	if err := s.open(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Server) open(ctx context.Context) (err error) {
	raiseFileLimit(s.log)
	if err := os.MkdirAll(s.options.Data, 0o700); err != nil {
		return fmt.Errorf("--data: %w", err)
	}
	if s.lock, err = lockData(s.options.Data); err != nil {
		return err
	}
	if err := s.openStore(ctx); err != nil {
		return err
	}
	if s.ca, err = pki.Open(ctx, pki.Config{Store: s.store, MasterKeyFile: filepath.Join(s.options.Data, "master.key"), Prepare: s.openMasterKeys}); err != nil {
		return err
	}
	s.masters = &masterRotation{server: s}
	s.tokens = token.New(token.Config{Store: s.store, Failures: ratelimit.New(failureRate, failureBurst), Logger: s.log})
	adminToken := filepath.Join(s.options.Data, "admin.token")
	made, err := s.tokens.Bootstrap(ctx, adminToken)
	if err != nil {
		return err
	}
	if made {
		s.log.Info("first admin token written", "file", adminToken)
	}
	s.audit = audit.New(audit.Config{Store: s.store, DefaultOrganization: store.DefaultOrganizationID, Logger: s.log, Needed: s.auditNeeded})
	s.joins = registration.New(registration.Config{
		Store: s.store, CA: s.ca, Audit: s.audit, Logger: s.log,
		Failures: ratelimit.New(joinRate, joinBurst), Renewals: ratelimit.New(renewRate, renewBurst),
	})
	if err := recoverQueries(ctx, s.store, s.audit, s.log, s.replica); err != nil {
		return err
	}
	return s.wire(ctx)
}

func (s *Server) openStore(ctx context.Context) (err error) {
	cfg := store.Config{PostgresDSN: s.options.Database, PasswordFile: s.options.DatabasePasswordFile, HistoryAge: s.options.HistoryAge, Logger: s.log}
	if s.options.Database == "" {
		cfg.SQLitePath = filepath.Join(s.options.Data, "controlplane.db")
	}
	if cfg.Replica, err = replicaName(s.options.Data); err != nil {
		return err
	}
	s.replica = cfg.Replica
	s.store, err = store.Open(ctx, cfg)
	return err
}

// wire makes the parts that serve and puts them together.
func (s *Server) wire(ctx context.Context) error {
	registry := prometheus.NewRegistry()
	var err error
	s.registerMasterKeyMetrics(registry)
	if s.forwarder, err = s.newForwarder(registry); err != nil {
		return err
	}
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), buildInfo())
	s.events = newLinkEvents(s.store, s.log)
	s.sessions = newSessionCloser(s.store, func(id string) (liveAgent, error) {
		l := s.hub.Local(id) // each replica does it for its own
		if l == nil {
			return liveAgent{}, errOffline
		}
		return liveAgent{l}, nil
	}, s.log)
	s.catalogs = catalog.New(catalog.Config{
		Store: s.store, Audit: s.audit, Logger: s.log, Generation: store.NewGeneration,
		Here: func(id string) bool { return s.hub.Local(id) != nil },
		Connect: func(id string) (catalog.Agent, error) {
			if s.refusing.Load() {
				return nil, errDraining
			}
			l, err := s.hub.Agent(id)
			if err != nil {
				return nil, err
			}
			return catalogAgent{l}, nil
		},
	})
	if err := s.wireFiles(ctx, registry); err != nil {
		return err
	}
	directory, err := s.newReplicas(registry)
	if err != nil {
		return err
	}
	// Agents have one budget and users another: neither can take the other's.
	s.hub = hub.New(hub.Config{
		Guard:     budget.New(bodyBudget).Guard,
		Directory: directory, Members: members{s.files.AgentHandler()},
		Logger: s.log, Gate: gate{s.ca, s.joins}, Joiner: joiner{s.joins, s.catalogs, s.sessions, s.outdated, s.store.AuditHead}, Rows: &rows{s}, Reports: &reports{s}, Events: events{s.events, s.catalogs, s.sessions, s}, Metrics: hub.NewMetrics(registry),
	})
	s.tunnels = tunnel.NewServer(tunnel.ServerConfig{
		Config:  tunnel.Config{Logger: s.log, Metrics: tunnel.NewMetrics(registry)},
		TLS:     s.ca.TLSConfig(),
		Handler: s.hub.Handle,
		// Behind a proxy on this machine each host has its own share.
		RemoteIP: api.RemoteAddress,
	})
	box := s.ca.Box(rowsOfQueries)
	queryMetrics := query.NewMetrics(registry)
	s.reports = s.newReports(box, queryMetrics)
	s.queries = query.NewRunner(query.Config{
		Box:    box,
		Logger: s.log, History: s.store, Audit: queryAudit{s.audit}, Metrics: queryMetrics,
		Find: s.store.FindAgent,
		Connect: func(id string) (query.Agent, error) {
			if s.refusing.Load() {
				return nil, errDraining
			}
			l, err := s.hub.Agent(id)
			if err != nil {
				return nil, err
			}
			return queryAgent{l}, nil
		},
	})
	requests := ratelimit.New(requestRate, requestBurst)
	s.journal = query.NewJournal(query.JournalConfig{Logger: s.log, Record: recorder{s.store}.record, Append: queryAudit{s.audit}.appendAll, Metrics: queryMetrics})
	if err := s.listen(); err != nil {
		return err
	}
	s.pg = pgwire.New(pgwire.Config{
		Logger: s.log, Tokens: pgTokens{s.tokens}, Permit: mayRunStatements, Find: s.store.FindAgent, Journal: pgJournal{s.journal}, TLS: s.pgTLS(),
		Requests: requests, Cancels: ratelimit.New(cancelRate, cancelBurst), Metrics: pgwire.NewMetrics(registry),
		CancelElsewhere: s.replicas.cancelKey,
		Connect: func(id string) (pgwire.Agent, error) {
			l, err := s.hub.Agent(id)
			if err != nil {
				return nil, err
			}
			return pgAgent{l}, nil
		},
	})
	s.wireKernels(registry, requests)
	s.api = api.New(api.Config{
		Logger: s.log, Tokens: tokens{s.tokens, s.pg, s.jupyter, s.notebooks, s.secrets}, Keys: s.joins, Store: s.store, Audit: s.audit, CA: s.ca, Rotation: rotation{s}, MasterKeys: s.masters, FileKeys: fileKeyRotation{s},
		Agents: agents{s.hub, s.store, s.replicas, s.joins, s.tokens, s.pg, s.jupyter, s.notebooks}, Queries: queries{s.queries, s.journal, s.replicas}, Catalogs: s.catalogs, Kernels: kernels{s.kernels}, Notebooks: notebooks{s.notebooks}, Checkpoints: kernels{s.kernels}, Moves: kernels{s.kernels}, Secrets: secretAPI{s.secrets}, Jupyter: s.jupyter, Files: s.files,
		DAV:      s.newDAV(requests),
		Guard:    budget.New(bodyBudget).Guard,
		Gatherer: registry, Tunnel: s.tunnelEndpoint(), Ready: s.ready, Requests: requests,
	})
	s.http.Handler = s.lastAnswers(s.api)
	return nil
}

// listen makes the listeners and the HTTP server, which has no handler yet.
func (s *Server) listen() error {
	s.http = &http.Server{
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	listener, err := net.Listen("tcp", s.options.Listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	s.listener = newDrainingListener(listener)
	if s.options.PGListen != "" {
		if s.pgListener, err = net.Listen("tcp", s.options.PGListen); err != nil {
			return fmt.Errorf("--pg-listen: %w", err)
		}
		if address := s.pgListener.Addr().(*net.TCPAddr); s.options.TLSCert == "" && !address.IP.IsLoopback() {
			return fmt.Errorf("--pg-listen %s: API tokens and data would cross the network in the clear: give --tls-cert and --tls-key too, or a loopback address", s.options.PGListen)
		}
	}
	if s.options.TLSCert != "" {
		files, err := newCertificateFiles(s.options.TLSCert, s.options.TLSKey)
		if err != nil {
			return err
		}
		s.http.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: files.get}
	}
	return nil
}

// pgTLS is the TLS of PostgreSQL's clients, which may also begin with it at once; nil
// without a certificate.
func (s *Server) pgTLS() *tls.Config {
	if s.http.TLSConfig == nil {
		return nil
	}
	config := s.http.TLSConfig.Clone()
	config.NextProtos = []string{"postgresql"}
	// Results are long: full records from the start.
	config.DynamicRecordSizingDisabled = true
	return config
}

// errOffline is for an agent whose tunnel does not end here.
var errOffline = proto.Errorf(proto.CodeAgentOffline, "the agent has no tunnel to this replica")

// errDraining is what new statements get while the control plane stops.
var errDraining = proto.Errorf(proto.CodeUnavailable, "this control plane is stopping: try again")

// Addr is the address that it listens on.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// PGAddr is the address for clients of PostgreSQL; nil if there is none.
func (s *Server) PGAddr() net.Addr {
	if s.pgListener == nil {
		return nil
	}
	return s.pgListener.Addr()
}

func (s *Server) ready(ctx context.Context) error {
	if s.draining.Load() {
		return errDraining
	}
	return s.store.Ping(ctx)
}

// Run serves until ctx ends, then drains and closes everything.
func (s *Server) Run(ctx context.Context) error {
	s.log.Info("control plane serving", "listen", s.Addr().String(), "tls", s.options.TLSCert != "", "store", s.store.Engine(), "version", proto.Software())
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var group errgroup.Group
	if s.replicas != nil {
		s.replicas.start(work, &group, stop)
	}
	group.Go(func() error {
		var err error
		if s.http.TLSConfig != nil {
			err = s.http.ServeTLS(s.listener, "", "")
		} else {
			err = s.http.Serve(s.listener)
		}
		if !errors.Is(err, http.ErrServerClosed) {
			stop()
			return fmt.Errorf("serve %s: %w", s.Addr(), err)
		}
		return nil
	})
	if s.pgListener != nil {
		s.log.Info("serving clients of PostgreSQL", "listen", s.pgListener.Addr().String())
		group.Go(func() error {
			if err := s.pg.Serve(s.pgListener); !errors.Is(err, pgwire.ErrClosed) {
				stop()
				return fmt.Errorf("serve %s: %w", s.pgListener.Addr(), err)
			}
			return nil
		})
	}
	group.Go(func() error { s.housekeep(work); return nil })
	group.Go(func() error { s.retireAudit(work); return nil })
	group.Go(func() error { s.forwardAudit(work); return nil })
	group.Go(func() error { s.collectFiles(work); return nil })
	group.Go(func() error { s.followCA(work); return nil })
	group.Go(func() error { s.followMasterKeys(work); return nil })
	group.Go(func() error { s.followFileKeys(work); return nil })
	group.Go(func() error { s.awaitBlob(work); return nil })
	s.notify(daemon.SdNotifyReady)
	select {
	case <-ctx.Done():
	case <-work.Done():
	}
	s.drain()
	stop()
	return errors.Join(group.Wait(), s.Close())
}

// notify tells systemd, if it started us.
func (s *Server) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		s.log.Warn("systemd not told", "err", err)
	}
}

// housekeep runs what has to be done now and then.
func (s *Server) housekeep(ctx context.Context) {
	recheck, slow := time.NewTicker(recheckEvery), time.NewTicker(housekeepEvery)
	defer recheck.Stop()
	defer slow.Stop()
	since := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-recheck.C:
			since = s.recheck(ctx, since)
		case <-slow.C:
			if err := s.store.TouchAgents(ctx, s.hub.OnlineIDs(), time.Now()); err != nil && ctx.Err() == nil {
				s.log.Warn("last-seen times not written", "err", err)
			}
			if _, err := s.store.Exclusively(ctx, "history", func(ctx context.Context) error { s.forget(ctx); return nil }); err != nil && ctx.Err() == nil {
				s.log.Warn("history not pruned", "err", err)
			}
		}
	}
}

// forget takes what is too old out of the history, as much as there is by now.
func (s *Server) forget(ctx context.Context) {
	for {
		n, err := s.store.PruneQueries(ctx, "", time.Now())
		if err != nil && ctx.Err() == nil {
			s.log.Warn("history not pruned", "err", err)
		}
		if err != nil || n == 0 {
			return
		}
	}
}

// recheck cuts what another replica has revoked or disabled since a time.
func (s *Server) recheck(ctx context.Context, since time.Time) time.Time {
	now := time.Now()
	agents, organizations, err := s.store.CutSince(ctx, since.Add(-clockSlack))
	if err != nil {
		if ctx.Err() == nil {
			s.log.Warn("revocations not read", "err", err)
		}
		return since // these are read next time
	}
	tokens, err := s.store.TokensRevokedSince(ctx, since.Add(-clockSlack))
	if err == nil {
		err = s.sessions.revoked(ctx, since.Add(-clockSlack), tokens)
	}
	if err != nil {
		if ctx.Err() == nil {
			s.log.Warn("revoked tokens not read", "err", err)
		}
		return since
	}
	if len(agents)+len(tokens)+len(organizations) > 0 {
		s.joins.Forget()
		s.tokens.Forget()
	}
	for _, id := range agents {
		s.hub.Disconnect(id, hub.ErrRevoked)
	}
	for _, revoked := range tokens {
		s.pg.CutToken(revoked.Token)
		s.jupyter.CutToken(revoked.Token)
		s.notebooks.CutToken(revoked.Token)
	}
	for _, id := range organizations {
		s.pg.CutOrganization(id)
		s.jupyter.CutOrganization(id)
		s.notebooks.CutOrganization(id)
		s.hub.DisconnectOrganization(id, hub.ErrDisabled)
	}
	return now
}

// Close ends what is left. It may be called more than once.
func (s *Server) Close() error {
	var err error
	if s.listener != nil {
		s.listener.Close() //nolint:errcheck // the server may have closed it
	}
	if s.pgListener != nil {
		s.pgListener.Close() //nolint:errcheck // likewise
	}
	if s.pg != nil {
		s.pg.Close()
	}
	if s.jupyter != nil {
		s.jupyter.Close()
	}
	if s.journal != nil {
		s.journal.Close()
		s.journal = nil
	}
	if s.sessions != nil {
		s.sessions.close()
	}
	if s.catalogs != nil {
		s.catalogs.Close()
	}
	if s.secrets != nil {
		s.secrets.Close()
	}
	if s.hub != nil {
		s.hub.Close()
	}
	if s.tunnels != nil {
		s.tunnels.Close()
	}
	if s.replicas != nil {
		s.replicas.close()
		s.replicas = nil
	}
	if s.files != nil {
		s.files.Close()
		s.files = nil
	}
	if s.blobs != nil {
		err = errors.Join(err, s.blobs.Close())
		s.blobs = nil
	}
	if s.events != nil {
		s.events.close()
		s.events = nil
	}
	if s.store != nil {
		err = errors.Join(err, s.store.Close())
		s.store = nil
	}
	if s.lock != nil {
		s.lock.Close() //nolint:errcheck // closing it is what unlocks
		s.lock = nil
	}
	return err
}

// lockData keeps a second control plane out of the same directory; the kernel
// drops the lock with the process.
func lockData(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("--data: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close() //nolint:errcheck // it was only for the lock
		return nil, fmt.Errorf("--data %s: another control plane runs on it: stop that one, or give this one a directory of its own", dir)
	}
	// For `controlplane drain`.
	if err := errors.Join(f.Truncate(0), writePID(f)); err != nil {
		f.Close() //nolint:errcheck // likewise
		return nil, fmt.Errorf("--data %s: %w", dir, err)
	}
	return f, nil
}

// lockName is the file in DATA whose lock a control plane holds; its pid is in it.
const lockName = "lock"

func writePID(f *os.File) error {
	_, err := fmt.Fprintln(f, os.Getpid())
	return err
}

// raiseFileLimit allows as many connections as the system does.
func raiseFileLimit(log *slog.Logger) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return
	}
	limit.Cur = limit.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		log.Warn("limit of open files not raised", "err", err)
	}
}

func buildInfo() prometheus.Collector {
	g := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "controlplane_build_info", Help: "Always 1; the version is a label.", ConstLabels: prometheus.Labels{"version": proto.Software()},
	})
	g.Set(1)
	return g
}
