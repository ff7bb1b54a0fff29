package main

import (
	"context"
	"errors"
	"net/http"
	"path/filepath"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/postern-dev/postern/controlplane/api"
	"github.com/postern-dev/postern/controlplane/blob"
	"github.com/postern-dev/postern/controlplane/filekey"
	"github.com/postern-dev/postern/controlplane/hub"
	"github.com/postern-dev/postern/controlplane/ratelimit"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/controlplane/workspace"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

var (
	_ api.Files        = (*workspace.Service)(nil)
	_ workspace.Store  = (*store.Store)(nil)
	_ workspace.Chunks = (*blob.Store)(nil)
	_ blob.Index       = (*store.Store)(nil)
	_ blob.Keys        = (*filekey.Service)(nil)
	_ filekey.Store    = (*store.Store)(nil)
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
	s.fileKeys = filekey.New(s.store, s.ca.Keys())
	s.blobs, err = blob.Open(ctx, where, blob.Config{
		Logger: s.log, Index: s.store, Metrics: blob.NewMetrics(registry),
		Keys: s.fileKeys,
	})
	if err != nil {
		return err
	}
	if s.blobAway, err = s.checkBlob(ctx, where); err != nil {
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
		Ask: s.askAttachments,
		Ops: ratelimit.New(fileRate, fileBurst), Poll: poll, OrganizationNodes: s.options.OrganizationFiles, Metrics: workspace.NewMetrics(registry),
	})
	return nil
}

// askAttachments asks an agent for the status of its mounts.
func (s *Server) askAttachments(ctx context.Context, agent string, r *posternv1.GetAttachStatusRequest) (*posternv1.GetAttachStatusResponse, error) {
	l, err := s.hub.Agent(agent)
	if err != nil {
		return nil, err
	}
	client := posternv1connect.NewAttachHostServiceClient(l.HTTP(tunnel.Control), "http://agent", connect.WithReadMaxBytes(maxAttachStatus))
	return unwrap(l, func() (*connect.Response[posternv1.GetAttachStatusResponse], error) {
		return client.GetAttachStatus(ctx, connect.NewRequest(r))
	})
}

// maxAttachStatus bounds an agent's answer, in bytes.
const maxAttachStatus = 8 << 20

// members serves files to agents on their tunnels.
type members struct{ http.Handler }

func (members) Serves(path string) bool { return workspace.IsAgentPath(path) }

// tidyFiles does that once; what fails is logged, and done the next time.
func (s *Server) tidyFiles(ctx context.Context) error {
	if err := s.files.Keep(ctx); err != nil && ctx.Err() == nil {
		s.log.Warn("workspaces not tidied up", "err", err)
	}
	n, err := s.blobs.Collect(ctx)
	switch {
	case err != nil && !errors.Is(err, context.Canceled) && ctx.Err() == nil:
		s.log.Warn("unused chunks not collected", "err", err)
	case n > 0:
		s.log.Info("unused chunks collected", "objects", n)
	}
	return nil
}

// collectFiles removes what files no longer need, now and then, until ctx ends.
func (s *Server) collectFiles(ctx context.Context) {
	ticker := time.NewTicker(collectEvery)
	defer ticker.Stop()
	for {
		// Of several replicas one does it at a time.
		if _, err := s.store.Exclusively(ctx, "files", s.tidyFiles); err != nil && ctx.Err() == nil {
			s.log.Warn("workspaces not tidied up", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}
