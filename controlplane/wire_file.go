package main

import (
	"context"
	"errors"
	"net/http"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/postern-dev/postern/controlplane/api"
	"github.com/postern-dev/postern/controlplane/blob"
	"github.com/postern-dev/postern/controlplane/hub"
	"github.com/postern-dev/postern/controlplane/ratelimit"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/controlplane/workspace"
)

var (
	_ api.Files        = (*workspace.Service)(nil)
	_ workspace.Store  = (*store.Store)(nil)
	_ workspace.Chunks = (*blob.Store)(nil)
	_ blob.Index       = (*store.Store)(nil)
	_ hub.Members      = members{}
)

const (
	// fileRate and fileBurst bound the requests of files of one agent a second.
	fileRate, fileBurst = 500, 2000
	// pollChanges is how often a replica looks for changes that another one made.
	pollChanges = 300 * time.Millisecond
	// collectEvery is how often chunks that nobody refers to are removed.
	collectEvery = 10 * time.Minute
)

// wireFiles makes what serves workspaces.
func (s *Server) wireFiles(ctx context.Context, registry prometheus.Registerer) error {
	where := s.options.Blob
	if where == "" {
		where = filepath.Join(s.options.Data, "blob")
	}
	var err error
	s.blobs, err = blob.Open(ctx, where, blob.Config{
		Logger: s.log, Index: s.store, Metrics: blob.NewMetrics(registry),
		Sealer: func(organization string) (blob.Sealer, error) { return s.ca.Box("files of " + organization) },
	})
	if err != nil {
		return err
	}
	var poll time.Duration
	if s.options.Database != "" {
		poll = pollChanges
	}
	s.files = workspace.New(workspace.Config{
		Logger: s.log, Store: s.store, Chunks: s.blobs, Append: s.audit.AppendAll,
		Caller: func(ctx context.Context) workspace.Caller {
			c := api.CallerOf(ctx)
			return workspace.Caller{Principal: c.Principal, Remote: c.Remote}
		},
		Agent: func(ctx context.Context) workspace.Agent {
			m := hub.MemberOf(ctx)
			return workspace.Agent{Organization: m.Organization, ID: m.Agent, Name: m.Name}
		},
		Ops: ratelimit.New(fileRate, fileBurst), Poll: poll, Metrics: workspace.NewMetrics(registry),
	})
	return nil
}

// members serves files to agents on their tunnels.
type members struct{ http.Handler }

func (members) Serves(path string) bool { return workspace.IsAgentPath(path) }

// collectFiles removes what files no longer need, now and then, until ctx ends.
func (s *Server) collectFiles(ctx context.Context) {
	ticker := time.NewTicker(collectEvery)
	defer ticker.Stop()
	for {
		n, err := s.blobs.Collect(ctx)
		switch {
		case err != nil && !errors.Is(err, context.Canceled) && ctx.Err() == nil:
			s.log.Warn("unused chunks not collected", "err", err)
		case n > 0:
			s.log.Info("unused chunks collected", "objects", n)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}
