package kernel

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/postern-dev/postern/agentd/kernel/internal/localsql"
	"github.com/postern-dev/postern/agentd/kernel/internal/runsock"
	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/agentd/kernel/python"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// LocalSource is a data source that kernels may use.
type LocalSource = localsql.Source

// SQL answers what kernels ask of data sources. Its methods may be called by several
// kernels at once.
type SQL interface {
	// RunLocal runs a statement on behalf of the request's principal; from names the
	// kernel in the log. It writes rows to w as an Arrow IPC stream; the outcome is never
	// nil and has the error.
	RunLocal(ctx context.Context, request *posternv1.SQLRequest, from string, w io.Writer) *posternv1.QueryOutcome
	// LocalSources are the data sources that kernels may use.
	LocalSources() []LocalSource
}

const (
	// sqlSocket is in a kernel's run directory.
	sqlSocket = "sql.sock"
	// moduleInside is where a kernel finds the Python module.
	moduleInside = "/srv/postern/python"
	// maxLocal is how many statements of one kernel run at once; the next one waits.
	maxLocal = 8
)

// bringModule lets a Python kernel import the module postern, and IPython load it.
func (m *Manager) bringModule(sp spec, s *sandbox.Spec, env map[string]string) {
	if m.cfg.SQL == nil || m.cfg.ModuleDir == "" || !sp.ipython() {
		return
	}
	dir, err := python.Install(m.cfg.ModuleDir)
	if err != nil {
		// A kernel without it is worth more than none.
		m.logger.Error("the module postern is not there for a kernel", "dir", m.cfg.ModuleDir, "err", err)
		return
	}
	if s.Dir == "" && len(s.Binds) == 0 {
		s.Dir = sandbox.HomeInside // not the first of Binds
	}
	s.Binds = append(s.Binds, sandbox.Bind{Source: dir, Target: moduleInside, ReadOnly: true, Key: "python"})
	s.Argv = append(s.Argv, "--IPKernelApp.extra_extensions="+python.Extension)
	env["POSTERN_SOCKET"] = sandbox.RunInside + "/" + sqlSocket
	env["PYTHONPATH"] = strings.TrimPrefix(env["PYTHONPATH"]+":"+moduleInside, ":")
}

// serveSQL answers a kernel's statements until ctx ends. The socket is in a directory
// that the kernel may write; what it does to it harms the kernel alone.
func (m *Manager) serveSQL(ctx context.Context, k *kernel) {
	uid := k.spec.Sandbox.UID
	l, err := runsock.Listen(k.spec.Sandbox.RunDir, sqlSocket, uid)
	if err != nil {
		m.logger.Error("a kernel cannot ask for SQL", "dir", k.dir, "err", err)
		return
	}
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	var open sync.WaitGroup
	defer open.Wait()
	places := make(chan struct{}, maxLocal)
	for {
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			_ = l.Close()
			return
		}
		conn, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			m.logger.Warn("a kernel's connection for SQL was not taken", "dir", k.dir, "err", err)
			<-places
			select { // no descriptors, most likely
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
			continue
		}
		open.Go(func() {
			defer func() { <-places }()
			if peer, err := runsock.PeerUID(conn); err != nil || peer != uid {
				_ = conn.Close()
				return
			}
			if err := localsql.Serve(ctx, conn, m.backend(k)); err != nil && ctx.Err() == nil {
				m.logger.Debug("a kernel hung up on its statement", "dir", k.dir, "err", err)
			}
		})
	}
}

// backend is SQL on behalf of a kernel's owner.
func (m *Manager) backend(k *kernel) localsql.Backend {
	m.mu.Lock()
	id, owner := k.spec.ID, json.RawMessage(k.spec.Owner)
	m.mu.Unlock()
	p := &posternv1.Principal{}
	if id == "" || protojson.Unmarshal(owner, p) != nil {
		return localBackend{sql: nobody{}, revoked: context.Background()} // it waits for an owner
	}
	return localBackend{m.cfg.SQL, id, p, k.revoked}
}

type localBackend struct {
	sql   SQL
	id    string
	owner *posternv1.Principal
	// revoked ends when the owner may ask for nothing any more.
	revoked context.Context
}

// Run implements localsql.Backend.
func (b localBackend) Run(ctx context.Context, r *posternv1.SQLRequest, w io.Writer) *posternv1.QueryOutcome {
	r.Principal = b.owner
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(b.revoked, func() { cancel(context.Cause(b.revoked)) })
	defer stop()
	if b.revoked.Err() != nil {
		cancel(context.Cause(b.revoked)) // before anything is asked: RunLocal refuses, and the log has it
	}
	outcome := b.sql.RunLocal(ctx, r, "kernel "+b.id, w)
	if b.revoked.Err() != nil && outcome.GetError().GetCode() == proto.CodeCancelled {
		outcome.Error = proto.Detail(context.Cause(b.revoked)) // who cancelled it
	}
	return outcome
}

// Sources implements localsql.Backend.
func (b localBackend) Sources() []localsql.Source { return b.sql.LocalSources() }

// nobody has no data sources.
type nobody struct{}

func (nobody) RunLocal(context.Context, *posternv1.SQLRequest, string, io.Writer) *posternv1.QueryOutcome {
	return &posternv1.QueryOutcome{} // unreachable: there is no source
}

func (nobody) LocalSources() []LocalSource { return nil }
