package main

import (
	"context"
	"errors"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/attach/bucket"
	"github.com/postern-dev/postern/agentd/attach/fdkeeper"
	"github.com/postern-dev/postern/agentd/attach/mountd"
	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

const (
	// attachPath is where the bodies of chunks go, beside AttachService.
	attachPath = "/postern/v1/attach/"
	// keepEvery is how often agentd looks whether mountd is there.
	keepEvery = 5 * time.Second
	// askMountd bounds a question to mountd that is to be answered from memory.
	askMountd = 3 * time.Second

	actionMount  = "attachment.mount"
	actionUmount = "attachment.umount"
)

// attachments is agentd's side of mounts: it lends mountd the tunnel, sees to it that the
// keeper runs, and decides. mountd itself outlives it.
type attachments struct {
	daemon  *Daemon
	client  mountd.Client
	server  *http.Server
	buckets *buckets
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	mu      sync.Mutex
	failure string // why the keeper does not run
	// starting are kernels that are not listed yet, and have mounts already.
	starting map[string]int
	// seen is what mountd said last; nil: it did not answer. For metrics.
	seen atomic.Pointer[mountd.Status]
	// looking makes looks wait for each other.
	looking sync.Mutex
	// What the control plane was told last; of looks alone.
	reported, unsent bool
	told             time.Time
	// showing makes changes of agentd's own mounts wait for each other.
	showing sync.Mutex
}

// openAttachments begins; the link need not be up.
func (d *Daemon) openAttachments() error {
	dir, err := filepath.Abs(filepath.Join(d.state, attachDir))
	if err != nil {
		return err
	}
	a := &attachments{daemon: d, buckets: &buckets{daemon: d, metrics: bucket.NewMetrics(d.registry), open: map[string]*openBucket{}}, client: mountd.Client{Dir: dir}, starting: map[string]int{}}
	d.attach = a
	ctx, cancel := context.WithCancel(context.Background())
	a.cancel = cancel
	if err := a.lend(); err != nil {
		return err
	}
	a.wg.Go(func() { a.keep(ctx) })
	return nil
}

// lend begins to lend mountd the tunnel, on a host that mounts workspaces, or did: what is
// unsent there is sent all the same. Others get no directory.
func (a *attachments) lend() error {
	if a.server != nil {
		return nil
	}
	if !a.daemon.config.Load().Attachments.Enabled {
		if _, err := os.Stat(a.client.Dir); errors.Is(err, os.ErrNotExist) {
			return nil
		}
	}
	if err := os.MkdirAll(a.client.Dir, 0o700); err != nil {
		return err
	}
	listener, err := listenShort(a.client.Dir, proxySocket)
	if err != nil {
		return err
	}
	a.server = &http.Server{Handler: a.proxy(), ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(a.daemon.logger.Handler(), slog.LevelDebug)}
	server := a.server
	a.wg.Go(func() {
		server.Serve(listener) //nolint:errcheck // it ends with close
	})
	return nil
}

// listenShort makes a unix socket in a directory whose path may be long.
func listenShort(dir, name string) (net.Listener, error) {
	if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close() //nolint:errcheck // it was only looked through
	path := filepath.Join("/proc/self/fd", strconv.Itoa(int(d.Fd())), name)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// close leaves mounts, mountd and its keeper alone.
func (a *attachments) close() error {
	if a == nil {
		return nil
	}
	a.cancel()
	a.looking.Lock() // what looks from now on sees that it is over
	var err error
	if a.server != nil {
		err = errors.Join(a.server.Close(), os.Remove(filepath.Join(a.client.Dir, proxySocket)))
	}
	a.looking.Unlock()
	a.wg.Wait()
	a.buckets.close()
	return err
}

// keep sees to it that mountd runs while the configuration wants it, that it is of this
// agentd's version, and that it ends when nobody needs it any more.
func (a *attachments) keep(ctx context.Context) {
	ticker := time.NewTicker(keepEvery)
	defer ticker.Stop()
	for {
		err := a.look(ctx)
		a.mu.Lock()
		before := a.failure
		a.failure = ""
		if err != nil && ctx.Err() == nil {
			a.failure = oneLine(err.Error())
		}
		changed := a.failure != before && a.failure != ""
		a.mu.Unlock()
		if changed {
			a.daemon.logger.Error("mounts are not served", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func (a *attachments) look(ctx context.Context) error {
	a.looking.Lock()
	defer a.looking.Unlock()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := a.lend(); err != nil {
		return err
	}
	enabled := a.daemon.config.Load().Attachments.Enabled
	k, err := fdkeeper.Dial(a.client.Dir)
	switch {
	case err == nil:
		defer k.Close() //nolint:errcheck // it was only asked
	case !enabled:
		return nil
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return a.spawn(ctx)
	default:
		return err
	}
	ask, cancel := context.WithTimeout(ctx, askMountd)
	defer cancel()
	status, err := a.client.Status(ask)
	if err != nil {
		a.seen.Store(nil)
		return nil //nolint:nilerr // the keeper starts it, or says why not
	}
	a.seen.Store(&status)
	if !enabled {
		// Not while something is mounted or unsent: mountd refuses.
		_ = a.client.Shutdown(ask)
		return nil
	}
	a.report(ctx, status)
	if err := a.tend(ctx, status); err != nil {
		return err
	}
	if status.Software != proto.Version().Software {
		program, file, err := a.program()
		if err != nil {
			return err
		}
		a.daemon.logger.Info("mountd is upgraded in place", "from", status.Software, "to", proto.Version().Software)
		return k.Renew([]string{program, mountdArg, filepath.Dir(a.client.Dir), file})
	}
	return nil
}

func (a *attachments) program() (program, file string, err error) {
	if program = a.daemon.Executable; program == "" {
		if program, err = programPath(); err != nil {
			return "", "", err
		}
	}
	if program, err = filepath.Abs(program); err != nil {
		return "", "", err
	}
	file, err = filepath.Abs(a.daemon.places.config)
	return program, file, err
}

func (a *attachments) spawn(ctx context.Context) error {
	program, file, err := a.program()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	p, err := spawnKeeper(ctx, program, filepath.Dir(a.client.Dir), file)
	if err != nil {
		return err
	}
	a.daemon.logger.Info("keeper of mounts started", "pid", p.Pid)
	// While we live it is our child, and somebody must reap it; it outlives us.
	go func() {
		_, _ = p.Wait()
		a.daemon.logger.Warn("keeper of mounts has ended", "pid", p.Pid)
	}()
	return nil
}

// proxy lends mountd the tunnel: AttachService, and the bodies of chunks; and the buckets.
// Nothing else.
func (a *attachments) proxy() http.Handler {
	service := "/" + posternv1connect.AttachServiceName + "/"
	reverse := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host, r.Out.Host = "http", "controlplane", "controlplane"
		},
		Transport:     lent{a.daemon},
		FlushInterval: -1,
		BufferPool:    pieces{},
		ErrorLog:      log.New(io.Discard, "", 0), // the asker is told
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if proto.CodeOf(err) == proto.CodeInternal && r.Context().Err() == nil {
				err = proto.Errorf(proto.CodeAgentLost, "the link to the control plane broke")
			}
			proto.WriteHTTPError(w, err)
		},
	}
	objects := a.buckets.handler()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, bucket.Path) {
			objects.ServeHTTP(w, r)
			return
		}
		if strings.HasPrefix(r.URL.Path, service) || strings.HasPrefix(r.URL.Path, attachPath) {
			reverse.ServeHTTP(w, r)
			return
		}
		proto.WriteHTTPError(w, proto.Errorf(proto.CodeNotFound, "agentd lends its tunnel for attachments alone"))
	})
}

// pieces are what bodies are copied in: larger than the 32 KiB that one frame of the tunnel may have,
// so that what has arrived goes to mountd in one call. Requests hold one each while their bodies move.
type pieces struct{}

const pieceSize = 256 << 10

var pieceBuffers = sync.Pool{New: func() any { return new([pieceSize]byte) }}

// Get implements httputil.BufferPool.
func (pieces) Get() []byte { return pieceBuffers.Get().(*[pieceSize]byte)[:] }

// Put implements httputil.BufferPool.
func (pieces) Put(b []byte) { pieceBuffers.Put((*[pieceSize]byte)(b)) }

// lent is the tunnel that is up when a request comes.
type lent struct{ daemon *Daemon }

// RoundTrip implements http.RoundTripper.
func (l lent) RoundTrip(r *http.Request) (*http.Response, error) {
	if l.daemon.link == nil {
		return nil, proto.Errorf(proto.CodeAgentOffline, "the link to the control plane is down")
	}
	t, err := l.daemon.link.Transport(strings.HasPrefix(r.URL.Path, attachPath))
	if err != nil {
		return nil, err
	}
	return t.RoundTrip(r)
}

// mount does a step of a mount on the host itself.
func (d *Daemon) mount(ctx context.Context, m control.Mount) control.MountAnswer {
	began := time.Now()
	if m.Step == control.MountDetach {
		m.Workspace = d.mountedOn(ctx, m.Dir)
	}
	answer, action, err := d.mountStep(ctx, m)
	if action != "" {
		if aerr := d.recordMount(action, m, err, time.Since(began)); aerr != nil && err == nil {
			err = aerr
			if m.Step == control.MountAttach {
				_ = d.attach.client.Detach(ctx, m.Workspace, "host:"+m.Dir)
			}
		}
	}
	if err != nil {
		detail := proto.Detail(err)
		return control.MountAnswer{Code: detail.Code, Error: detail.Message}
	}
	return answer
}

// mountedOn is the workspace that is mounted on a directory; "" if there is none.
func (d *Daemon) mountedOn(ctx context.Context, dir string) string {
	s, err := d.attach.client.Status(ctx)
	if err != nil {
		return ""
	}
	for _, h := range s.Holders {
		if h.Name == "host:"+dir {
			return h.Workspace
		}
	}
	return ""
}

func (d *Daemon) mountStep(ctx context.Context, m control.Mount) (answer control.MountAnswer, action string, err error) {
	holder := "host:" + m.Dir
	c := d.config.Load().Attachments
	switch m.Step {
	case control.MountAttach:
		readOnly, reason := c.Mount(m.Workspace)
		if reason == "" {
			reason = c.HostMount(m.Dir)
		}
		if reason == "" && readOnly && !m.ReadOnly {
			m.ReadOnly = true
		}
		if reason != "" {
			return answer, actionMount, proto.Errorf(proto.CodePolicyDenied, "%s", reason)
		}
		h, err := d.attach.client.Attach(ctx, mountd.Holder{Workspace: m.Workspace, Name: holder, ReadOnly: m.ReadOnly})
		return control.MountAnswer{Sockets: d.attach.client.Dir, ReadOnly: h.ReadOnly}, actionMount, err
	case control.MountSettle:
		return answer, "", d.attach.client.Settle(ctx, "", holder, 10*time.Second)
	case control.MountDetach:
		return answer, actionUmount, d.attach.client.Detach(ctx, "", holder)
	}
	return answer, "", proto.Errorf(proto.CodeInvalid, "no such step of a mount: %.32q", m.Step)
}

// recordMount writes what was done to a mount into the host's log.
func (d *Daemon) recordMount(action string, m control.Mount, err error, took time.Duration) error {
	a := d.identity.Agent()
	e := auditchain.Entry{
		Action: action, Actor: "host", Agent: a.Name, Organization: a.Organization, Target: m.Workspace, Verdict: "allowed", Outcome: "done",
		Statement: "on " + m.Dir, DurationMillis: took.Milliseconds(),
	}
	if m.ReadOnly {
		e.Statement += ", read-only"
	}
	if m.Forced {
		e.Statement += ", forced"
	}
	if err != nil {
		e.Outcome, e.Error = "failed", proto.Detail(err).Message
		if proto.CodeOf(err) == proto.CodePolicyDenied {
			e.Outcome, e.Verdict = "denied", "denied"
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return d.log.Append(ctx, e)
}

// attachmentStatus is for commands on this host.
func (d *Daemon) attachmentStatus() control.Attachments {
	out := control.Attachments{Enabled: d.config.Load().Attachments.Enabled, Workspaces: []control.Attachment{}}
	if d.attach == nil {
		return out
	}
	ctx, cancel := context.WithTimeout(context.Background(), askMountd)
	defer cancel()
	s, err := d.attach.client.Status(ctx)
	if err != nil {
		if out.Enabled {
			d.attach.mu.Lock()
			out.Error = d.attach.failure
			d.attach.mu.Unlock()
			if out.Error == "" {
				out.Error = oneLine(err.Error())
			}
		}
		return out
	}
	out.PID, out.Software = s.PID, s.Software
	for _, w := range s.Workspaces {
		x := control.Attachment{
			Workspace: w.Workspace, ReadOnly: w.ReadOnly, Mounts: []string{}, UnsentChanges: w.UnsentOps, UnsentBytes: w.UnsentBytes, OldestUnsent: w.Oldest,
			Bucket: w.Bucket, Hidden: w.Hidden, Conflicts: w.Conflicts, CacheBytes: w.CacheBytes, Connected: w.Connected, LastError: w.LastError,
		}
		for _, h := range s.Holders {
			if h.Workspace != w.Workspace {
				continue
			}
			if dir, ok := strings.CutPrefix(h.Name, "host:"); ok {
				x.Mounts = append(x.Mounts, dir)
			} else {
				x.Mounts = append(x.Mounts, strings.Replace(h.Name, ":", " ", 1))
			}
		}
		if details, err := d.attach.details(ctx, w); err == nil {
			for _, path := range details.Unsent {
				x.UnsentPaths = append(x.UnsentPaths, string(path))
			}
			for _, c := range details.Conflicts {
				x.ConflictCopies = append(x.ConflictCopies, control.ConflictCopy{Path: string(c.Path), KeptAs: string(c.KeptAs), Time: time.Unix(0, c.TimeNs).UTC()})
			}
		}
		out.Workspaces = append(out.Workspaces, x)
	}
	return out
}
