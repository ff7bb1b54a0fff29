package child

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgguard"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgproxy"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/proto"
)

// hangupTimeout bounds the end of a proxy whose client has gone: what runs is
// cancelled in the database first.
const hangupTimeout = 8 * time.Second

// wireFrame takes a frame for the proxy, from the goroutine that reads.
func (p *process) wireFrame(t frame.Type, d *frame.Reader) error {
	proxy := p.proxy.Load()
	if proxy == nil {
		return fmt.Errorf("%w: %q before the proxy has begun", frame.ErrMalformed, byte(t))
	}
	switch t {
	case frame.Data:
		for d.Left() > 0 {
			chunk, err := d.Chunk()
			if err != nil {
				return err
			}
			if err := proxy.Feed(chunk); err != nil {
				return err
			}
		}
	case frame.WireAck:
		if d.Left() == 0 {
			proxy.Ack(nil)
			return nil
		}
		var refusal frame.Error
		if err := d.JSON(&refusal); err != nil {
			return err
		}
		proxy.Ack(&pgproxy.Refusal{SQLState: "53100", Message: refusal.Message, Code: proto.Code(refusal.Code)})
	case frame.WireStop:
		payload, err := d.Bytes()
		if err != nil {
			return err
		}
		reason, seq, ok := frame.ReadWireStop(payload)
		if !ok {
			return fmt.Errorf("%w: %q", frame.ErrMalformed, byte(t))
		}
		proxy.Stop(reason, seq)
	case frame.WireDrain:
		proxy.Drain()
	}
	return nil
}

// hangup ends a proxy as agentd, or its client, has gone; it tells whether there
// was one.
func (p *process) hangup() bool {
	proxy := p.proxy.Load()
	if proxy == nil {
		return false
	}
	proxy.Hangup()
	select {
	case <-p.proxied:
	case <-time.After(hangupTimeout):
	}
	return true
}

// serveProxy serves one client of PostgreSQL's protocol until it ends.
func (p *process) serveProxy(r *frame.WireRequest, conn net.Conn) int {
	defer close(p.proxied)
	s, ok := p.session.(*session)
	if !ok || s.wire.r != s.wire.w {
		return exitProtocol
	}
	masking, failure := s.masksOf(&r.Guard)
	if failure != nil {
		fmt.Fprintln(os.Stderr, "sql session:", failure)
		return exitProtocol
	}
	judge := &wireJudge{guard: &r.Guard, readWrite: r.ReadWrite, version: s.majorVersion(), masking: masking, parser: p.parser}
	millis := func(n int64) time.Duration { return time.Duration(n) * time.Millisecond }
	config := pgproxy.Config{
		SessionID: r.SessionID, Server: s.wire.conn, Parameters: s.wire.params, Version: s.majorVersion(), Cancel: s.cancel,
		Agentd: conn, Parser: p.parser, Judge: judge, Guard: r.Guard, ReadWrite: r.ReadWrite,
		MaxRows: r.MaxRows, MaxBytes: r.MaxBytes, Timeout: millis(r.TimeoutMillis), Idle: millis(r.IdleMillis), IdleInTransaction: millis(r.IdleInTransaction),
	}
	if slices.Contains([]string{plansStructure, plansFull, plansAnalyze}, r.Guard.Plans) {
		config.Planner = judge
	}
	switch {
	case r.Guard.Mode == modeMetadata:
		config.Spare, config.Discreet = spare, discreetWords
	case masking != nil:
		config.Hide = wireHide{masking: masking}
	}
	if masking != nil {
		config.Redact = masking.texts.String
	}
	// One goroutine works at a time: it waits for the client, for the server, or for the
	// one that reads agentd's frames. A second processor would be woken up for each of
	// them, which costs a sixth of what a small statement takes here.
	runtime.GOMAXPROCS(1)
	proxy := pgproxy.New(config)
	p.proxy.Store(proxy)
	if err := proxy.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "sql session:", clean(err.Error()))
		return exitProtocol
	}
	return exitDone
}

// wireJudge holds the queries of a client of PostgreSQL's protocol against the
// policy.
type wireJudge struct {
	guard     *frame.Guard
	readWrite bool
	version   int
	masking   *masking
	parser    pgtree.Parser
	domains   domains
}

// Judge implements pgproxy.Judge.
func (j *wireJudge) Judge(ctx context.Context, server pgproxy.Asker, text string, tree *pgtree.Tree) (pgproxy.Verdict, *pgproxy.Refusal) {
	v, refusal := j.permit(ctx, server, text, tree)
	if refusal != nil || v.DescribeOnly != nil || j.guard.Mode == modeMetadata {
		return v, refusal
	}
	v.Hide, refusal = wireMasks(ctx, j.masking, j.parser, server, text, tree)
	return v, refusal
}

func (j *wireJudge) permit(ctx context.Context, server pgproxy.Asker, text string, tree *pgtree.Tree) (pgproxy.Verdict, *pgproxy.Refusal) {
	if j.guard.Mode == modeMetadata {
		return j.metadata(ctx, server, text, tree)
	}
	reads := onlyReads(tree.GetStmts()[0].GetStmt().ProtoReflect(), true)
	if !j.readWrite && !reads {
		return pgproxy.Verdict{}, &pgproxy.Refusal{SQLState: stateReadOnly, Message: "the statement is refused: the data source is read-only, which allows SELECT, VALUES, TABLE and WITH ... SELECT"}
	}
	return j.guarded(ctx, server, text, tree)
}

// guarded holds what a statement calls against the policy.
func (j *wireJudge) guarded(ctx context.Context, server pgproxy.Asker, text string, tree *pgtree.Tree) (pgproxy.Verdict, *pgproxy.Refusal) {
	guard := *j.guard
	if !j.readWrite {
		guard.Mode = pgguard.ModeReadOnly
	}
	_, refusal := pgguard.Check(ctx, pgguard.Input{Tree: tree, Text: text, Guard: &guard, Version: j.version, CopyOut: true, Resolver: wireResolver{server}})
	var asked *pgproxy.Refusal
	switch {
	case refusal == nil && j.readWrite:
		return pgproxy.Verdict{}, nil // a function may write: every statement's intent is in the log
	case refusal == nil:
		return pgproxy.Verdict{Reads: true}, nil
	case errors.As(refusal.Err, &asked):
		return pgproxy.Verdict{}, asked
	case refusal.Err != nil:
		return pgproxy.Verdict{}, &pgproxy.Refusal{SQLState: "57014", Message: "the statement is refused: " + refusal.Reason, Code: proto.CodeUnavailable}
	}
	return pgproxy.Verdict{}, &pgproxy.Refusal{SQLState: "42501", Message: clean("the statement is refused: " + refusal.Reason), Position: refusal.Position}
}

// wireResolver asks over the connection of a client of PostgreSQL's protocol.
type wireResolver struct{ pgproxy.Asker }

// Resolve implements pgguard.Resolver.
func (r wireResolver) Resolve(ctx context.Context, q pgguard.Question) (*pgguard.Catalog, error) {
	catalog := newCatalog()
	all, more := questions(q)
	for i := 0; i < len(all); i++ {
		question := all[i]
		parameters := make([]string, len(question.parameters))
		for i, p := range question.parameters {
			parameters[i] = string(p)
		}
		rows, err := r.Ask(ctx, question.query, parameters...)
		if err != nil {
			return nil, err
		}
		for _, row := range rows {
			if len(row) != question.columns {
				return nil, errProtocol
			}
			question.row(catalog, row)
		}
		if i == len(all)-1 && *more {
			*more = false
			all = append(all, behindOf(q))
		}
	}
	return catalog, nil
}

// onlyReads tells whether a tree is a query that, functions apart, changes nothing.
func onlyReads(m protoreflect.Message, top bool) bool {
	name := string(m.Descriptor().Name())
	switch {
	case name == "SelectStmt":
	case strings.HasSuffix(name, "Stmt"), name == "IntoClause", name == "LockingClause":
		return false
	}
	fine := true
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsList() && f.Message() != nil:
			for i := range v.List().Len() {
				fine = fine && onlyReads(v.List().Get(i).Message(), false)
			}
		case f.Message() != nil:
			fine = fine && onlyReads(v.Message(), false)
		}
		return fine
	})
	return fine && (!top || name == "Node")
}
