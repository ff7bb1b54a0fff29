package host

import (
	"context"
	"net/http"
	"time"

	"connectrpc.com/connect"
	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Actions of introspection in the audit log.
const (
	actionIntrospectBegin = "source.introspect.begin"
	actionIntrospect      = "source.introspect"
)

const (
	// maxKnown bounds a request for introspection, in bytes.
	maxKnown = 4 << 20
	// maxPause is how long a page may wait to be read.
	maxPause = time.Minute
)

// serveIntrospect keeps a reader that does not read from holding a session for ever.
func (h *Host) serveIntrospect(w http.ResponseWriter, r *http.Request, next http.Handler) {
	control := http.NewResponseController(w)
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	stop := context.AfterFunc(h.abort, func() {
		cancel(context.Cause(h.abort))
		control.SetWriteDeadline(time.Now().Add(time.Second)) //nolint:errcheck // then the tunnel's end unblocks it
	})
	defer stop()
	ctx = context.WithValue(ctx, paceKey{}, func() {
		control.SetWriteDeadline(time.Now().Add(maxPause)) //nolint:errcheck // a test's recorder knows no deadlines
	})
	defer control.SetWriteDeadline(time.Time{}) //nolint:errcheck // the connection goes on
	next.ServeHTTP(w, r.WithContext(ctx))
}

// paceKey is for the function that gives the next page its time.
type paceKey struct{}

// Introspect sends a source's catalog. Two entries in the log say so: one on stable
// storage before anything is asked, one when it is over.
func (s rpc) Introspect(ctx context.Context, r *connect.Request[posternv1.IntrospectRequest], stream *connect.ServerStream[posternv1.CatalogPage]) error {
	if err := s.h.introspect(ctx, r.Msg, stream.Send); err != nil {
		return proto.ConnectError(err)
	}
	return nil
}

func (h *Host) introspect(ctx context.Context, r *posternv1.IntrospectRequest, send func(*posternv1.CatalogPage) error) error {
	entry := auditchain.Entry{Action: actionIntrospect, Actor: actor(r.Principal), Role: r.Principal.GetRole(), Source: clip(r.Source), Verdict: "allowed"}
	verdict := h.cfg.DecideIntrospection(r.Source)
	switch {
	case !verdict.Known:
		return proto.Errorf(proto.CodeNotFound, "this agent has no data source %q: see postern source list", clip(r.Source))
	case !verdict.Allowed:
		err := proto.Errorf(proto.CodePolicyDenied, "source %s: %s", r.Source, verdict.Reason)
		entry.Verdict, entry.Outcome, entry.Error = "denied", "denied", err.Message
		if failed := h.record(entry); failed != nil {
			return failed
		}
		return err
	}
	select {
	case h.checks <- struct{}{}:
		defer func() { <-h.checks }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	h.mu.Lock()
	draining := h.draining
	h.mu.Unlock()
	if draining {
		return proto.Errorf(proto.CodeUnavailable, "the agent is stopping: try again when it is back")
	}
	if err := h.settle(); err != nil {
		return err
	}
	intent := entry
	intent.Action = actionIntrospectBegin
	if err := h.record(intent); err != nil {
		return err
	}
	began := time.Now()
	pace, _ := ctx.Value(paceKey{}).(func())
	err := h.cfg.SQL.Introspect(ctx, Introspection{Source: r.Source, Known: r.Known, Timeout: verdict.Timeout}, func(page *posternv1.CatalogPage) error {
		entry.Rows += uint64(len(page.Tables) + len(page.Functions) + len(page.Types) + len(page.Sequences))
		entry.Bytes += uint64(gproto.Size(page))
		if pace != nil {
			pace()
		}
		return send(page)
	})
	entry.DurationMillis, entry.Outcome = time.Since(began).Milliseconds(), ending(err)
	if err != nil {
		entry.Error = proto.Detail(err).Message
	}
	if proto.CodeOf(err) == proto.CodeInternal {
		h.logger.Error("introspection failed", "source", r.Source, "err", err)
	}
	if failed := h.record(entry); failed != nil && err == nil {
		err = failed
	}
	return err
}
