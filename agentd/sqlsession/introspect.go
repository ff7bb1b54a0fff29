package sqlsession

import (
	"context"
	"errors"
	"fmt"
	"time"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Introspection asks for the catalog of a data source.
type Introspection struct {
	Source string
	// Hide are the patterns of what is left out; see package policy.
	Hide []string
	// Timeout bounds it altogether; 0, or more than the source's, means the source's.
	Timeout time.Duration
	// Known are schemas with the fingerprints of an earlier answer; what has not
	// changed since is not sent again.
	Known []*posternv1.CatalogSchema
}

// Introspect reads the catalog in a session of its own and hands it to take, page
// by page, the last one with Complete set. An error of take ends it, and so does
// the end of ctx, in the database too. Errors are *proto.Error or take's.
func (m *Manager) Introspect(ctx context.Context, request Introspection, take func(*posternv1.CatalogPage) error) error {
	err := m.introspect(ctx, request, take)
	var e *proto.Error
	if err != nil && !errors.As(err, &e) {
		m.log.Error("introspection failed", "source", request.Source, "err", err)
	}
	return err
}

func (m *Manager) introspect(ctx context.Context, request Introspection, take func(*posternv1.CatalogPage) error) error {
	m.mu.Lock()
	src, closed := m.sources[request.Source], m.closed
	var timeout time.Duration
	var coarse bool
	if src != nil && !closed {
		m.wg.Add(1)
		coarse = src.Guard.Mode == "metadata"
		timeout = narrower(src.StatementTimeout, request.Timeout)
	}
	m.mu.Unlock()
	switch {
	case closed:
		return &proto.Error{Code: proto.CodeUnavailable, Message: "the agent is going away: try again", Err: ErrClosed}
	case src == nil:
		return proto.Errorf(proto.CodeNotFound, "no data source %q on this host", request.Source)
	}
	defer m.wg.Done()
	ctx, cancel := context.WithTimeoutCause(ctx, timeout+timeoutGrace,
		proto.Errorf(proto.CodeTimeout, "data source %q: introspection took longer than its limit of %s", request.Source, timeout))
	defer cancel()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	m.wg.Go(func() {
		select {
		case <-m.stop:
			stop(&proto.Error{Code: proto.CodeUnavailable, Message: "the agent is going away: try again", Err: ErrClosed})
		case <-ctx.Done():
		}
	})
	if err := m.place(ctx, src); err != nil {
		return err
	}
	defer m.leave(src)
	s, err := m.start(ctx, src)
	if err != nil {
		return err
	}
	// Its process cancels what the database is at when its socket closes.
	defer m.drop(s)
	wake := context.AfterFunc(ctx, func() { _ = s.conn.SetReadDeadline(time.Now().Add(-time.Second)) })
	defer wake()
	ask := frame.IntrospectRequest{Hide: request.Hide, TimeoutMillis: max(1, timeout.Milliseconds()), Coarse: coarse, Known: map[string][]byte{}}
	for _, schema := range request.Known {
		ask.Known[schema.Name] = schema.Fingerprint
	}
	if err := s.send(frame.Introspect, ask); err != nil {
		return s.died()
	}
	err = s.takePages(request.Source, take)
	if ctx.Err() != nil {
		return contextError(ctx, "while the catalog was read")
	}
	return err
}

// takePages hands on pages until the process says how it ended.
func (s *session) takePages(source string, take func(*posternv1.CatalogPage) error) error {
	complete := false
	for {
		t, err := s.frames.Next()
		if err != nil {
			return s.lost(err)
		}
		switch t {
		case frame.Page:
			raw, err := s.frames.Bytes()
			if err != nil {
				return s.lost(err)
			}
			page, err := decodePage(raw)
			if err != nil || complete {
				return fmt.Errorf("%w: a page that is none", frame.ErrMalformed)
			}
			complete = page.Complete
			if err := take(page); err != nil {
				return err
			}
		case frame.Introspected:
			var reply frame.IntrospectedReply
			if err := s.frames.JSON(&reply); err != nil {
				return err
			}
			if failure := reply.Error.Proto(); failure != nil {
				failure.Message = fmt.Sprintf("data source %q: %s", source, failure.Message)
				return failure
			}
			if !complete {
				return fmt.Errorf("%w: the catalog is not complete", frame.ErrMalformed)
			}
			return nil
		default:
			return fmt.Errorf("%w: %q during introspection", frame.ErrMalformed, byte(t))
		}
	}
}

// lost is why the process's frames ended.
func (s *session) lost(err error) error {
	if errors.Is(err, frame.ErrMalformed) {
		return err
	}
	return s.died()
}

// decodePage reads a page from a process that we do not trust more than the
// database: it must hold what a page holds, and nothing else.
func decodePage(raw []byte) (*posternv1.CatalogPage, error) {
	var page posternv1.CatalogPage
	if err := (gproto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(raw, &page); err != nil {
		return nil, err
	}
	for _, t := range page.Tables {
		if t.GetSchema() == "" || t.GetName() == "" {
			return nil, errors.New("a table without a name")
		}
	}
	for _, f := range page.Functions {
		if f.GetSchema() == "" || f.GetName() == "" {
			return nil, errors.New("a function without a name")
		}
	}
	for _, x := range page.Types {
		if x.GetSchema() == "" || x.GetName() == "" {
			return nil, errors.New("a type without a name")
		}
	}
	for _, q := range page.Sequences {
		if q.GetSchema() == "" || q.GetName() == "" {
			return nil, errors.New("a sequence without a name")
		}
	}
	for _, schema := range page.Schemas {
		if schema.GetName() == "" {
			return nil, errors.New("a schema without a name")
		}
	}
	return &page, nil
}
