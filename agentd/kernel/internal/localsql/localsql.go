package localsql

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/sqlsplit"
)

// Bounds of frames, in bytes.
const (
	MaxRequest = 8 << 20
	maxData    = 256 << 10
	maxOutcome = 1 << 20
)

// requestTime is how long a kernel may take to say what it wants; writeTime how long
// it may take no data at all.
const (
	requestTime = 30 * time.Second
	writeTime   = 10 * time.Minute
)

// Request is what a kernel asks for.
type Request struct {
	// Op is sql, sources or placeholders: which names the statement asks values for.
	Op         string      `json:"op"`
	SQL        string      `json:"sql"`
	Source     string      `json:"source"` // "": the only one there is
	Parameters []Parameter `json:"parameters"`
	MaxRows    uint64      `json:"max_rows"`
}

// Parameter is a typed value: see posternv1.Parameter.
type Parameter struct {
	Name  string  `json:"name"`
	Value *string `json:"value"`
	Type  string  `json:"type"`
}

// Source is what is told of a data source.
type Source struct {
	Name   string `json:"name"`
	Engine string `json:"engine"`
	Mode   string `json:"mode"`
	Masked bool   `json:"masked"`
}

// Backend answers. Both methods may be called at once by several connections.
type Backend interface {
	// Run runs a statement and writes its rows to w as an Arrow IPC stream. It returns
	// an outcome in any case, with the error in it. ctx ends when the kernel has gone.
	Run(ctx context.Context, request *posternv1.SQLRequest, w io.Writer) *posternv1.QueryOutcome
	// Sources are the data sources that the kernel may use.
	Sources() []Source
}

// Serve answers the one request of a connection and closes it. ctx ends it early.
func Serve(ctx context.Context, conn net.Conn, b Backend) error {
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()

	w := &writer{conn: conn}
	request, err := read(conn)
	if err != nil {
		if errors.Is(err, io.EOF) {
			return nil // somebody looked whether it is there
		}
		return w.end(&posternv1.QueryOutcome{Error: proto.Detail(err)}, nil)
	}
	// Nothing more is to come: what comes is the kernel's going away.
	var gone sync.WaitGroup
	gone.Go(func() {
		_, _ = conn.Read(make([]byte, 1))
		cancel()
	})
	defer gone.Wait()
	defer conn.Close()
	switch request.Op {
	case "sources":
		return w.end(&posternv1.QueryOutcome{}, b.Sources())
	case "sql", "placeholders":
		source, err := pick(request.Source, b.Sources())
		if err != nil {
			return w.end(&posternv1.QueryOutcome{Error: proto.Detail(err)}, nil)
		}
		if request.Op == "sql" {
			return w.end(b.Run(ctx, statement(request, source.Name), w), nil)
		}
		names, err := find(source.Engine, request.SQL)
		if err != nil {
			return w.end(&posternv1.QueryOutcome{Error: proto.Detail(err)}, nil)
		}
		return w.send(outcome{Placeholders: names})
	}
	err = proto.Errorf(proto.CodeInvalid, "agentd does not know what %.40q is: restart the kernel to have a module of its version", request.Op)
	return w.end(&posternv1.QueryOutcome{Error: proto.Detail(err)}, nil)
}

// pick finds the source that a request means.
func pick(name string, sources []Source) (Source, error) {
	switch {
	case len(sources) == 0:
		return Source{}, proto.Errorf(proto.CodePolicyDenied, "kernels may use no data source of this host: its owner names them in kernels.sources of agentd.yaml")
	case name == "" && len(sources) == 1:
		return sources[0], nil
	case name == "":
		return Source{}, proto.Errorf(proto.CodeInvalid, "say which data source is meant (--source): %s", list(sources))
	}
	for _, s := range sources {
		if s.Name == name {
			return s, nil
		}
	}
	return Source{}, proto.Errorf(proto.CodePolicyDenied, "kernels may not use a data source %.64q of this host: its owner names them in kernels.sources of agentd.yaml, which has %s", name, list(sources))
}

// maxNames bounds the names of placeholders that are told, in bytes together.
const maxNames = maxOutcome / 2

// find finds a statement's placeholders, by the rules of its engine.
func find(engine, text string) (*placeholders, error) {
	e, err := sqlsplit.ParseEngine(engine)
	if err != nil {
		return nil, proto.Errorf(proto.CodeInternal, "placeholders: %v", err)
	}
	braced, colons := sqlsplit.PlaceholdersByForm(e, text)
	size := 0
	for _, names := range [][]string{braced, colons} {
		for _, name := range names {
			size += len(name) + len(`"",`)
		}
	}
	if size > maxNames {
		return nil, proto.Errorf(proto.CodeInvalid, "the names of the statement's placeholders have %d bytes, more than %d", size, maxNames)
	}
	return &placeholders{append([]string{}, braced...), append([]string{}, colons...)}, nil
}

// list names sources, ten at most.
func list(sources []Source) string {
	text := ""
	for i, s := range sources {
		if i == 10 {
			return text + ", ..."
		}
		if i > 0 {
			text += ", "
		}
		text += s.Name
	}
	return text
}

func statement(r *Request, source string) *posternv1.SQLRequest {
	s := &posternv1.SQLRequest{QueryId: proto.NewID("qry_"), Source: source, Sql: r.SQL, MaxRows: r.MaxRows}
	for _, p := range r.Parameters {
		s.Parameters = append(s.Parameters, &posternv1.Parameter{Name: p.Name, Value: p.Value, Type: p.Type})
	}
	return s
}

// read reads the request.
func read(conn net.Conn) (*Request, error) {
	if err := conn.SetReadDeadline(time.Now().Add(requestTime)); err != nil {
		return nil, err
	}
	var head [5]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, io.EOF
		}
		return nil, proto.Errorf(proto.CodeInvalid, "the request did not come whole within %s", requestTime)
	}
	n := binary.BigEndian.Uint32(head[1:])
	if head[0] != 'q' || n > MaxRequest {
		return nil, proto.Errorf(proto.CodeInvalid, "what came is no request of at most %d bytes", MaxRequest)
	}
	// As it comes, so that a length alone takes no memory.
	text, err := io.ReadAll(io.LimitReader(conn, int64(n)))
	if err != nil || len(text) < int(n) {
		return nil, proto.Errorf(proto.CodeInvalid, "the request did not come whole within %s", requestTime)
	}
	var request Request
	if err := json.Unmarshal(text, &request); err != nil {
		return nil, proto.Errorf(proto.CodeInvalid, "the request is not JSON of the form that agentd knows")
	}
	return &request, conn.SetReadDeadline(time.Time{})
}

// writer writes frames.
type writer struct {
	conn net.Conn
}

// Write implements io.Writer: frames of data.
func (w *writer) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		n := min(len(p), maxData)
		if err := w.frame('d', p[:n]); err != nil {
			return written, err
		}
		written, p = written+n, p[n:]
	}
	return written, nil
}

func (w *writer) frame(kind byte, payload []byte) error {
	if err := w.conn.SetWriteDeadline(time.Now().Add(writeTime)); err != nil {
		return err
	}
	head := make([]byte, 5, 5+maxData)
	head[0] = kind
	binary.BigEndian.PutUint32(head[1:], uint32(len(payload)))
	parts := net.Buffers{head, payload}
	_, err := parts.WriteTo(w.conn)
	return err
}

// outcome is posternv1.QueryOutcome as the module reads it.
type outcome struct {
	Rows       uint64      `json:"rows"`
	Tag        string      `json:"command_tag,omitempty"`
	Notices    []notice    `json:"notices,omitempty"`
	Parameters []parameter `json:"parameters,omitempty"`
	Sources    []Source    `json:"sources,omitempty"`
	Error      *fault      `json:"error,omitempty"`
	// Placeholders answers the request of that name.
	Placeholders *placeholders `json:"placeholders,omitempty"`
}

// placeholders are names, each once: those in {{ }} need a value, those behind a colon
// are sent one if there is one.
type placeholders struct {
	Braces []string `json:"braces"`
	Colons []string `json:"colons"`
}

type notice struct {
	Severity string `json:"severity"`
	SQLState string `json:"sqlstate"`
	Message  string `json:"message"`
}

type parameter struct {
	Name string `json:"name"`
	Type string `json:"type"`
}

type fault struct {
	Code    string    `json:"code"`
	Message string    `json:"message"`
	SQL     *sqlFault `json:"sql,omitempty"`
}

type sqlFault struct {
	SQLState string `json:"sqlstate"`
	Position uint32 `json:"position,omitempty"`
	Detail   string `json:"detail,omitempty"`
	Hint     string `json:"hint,omitempty"`
}

// end sends the last frame.
func (w *writer) end(q *posternv1.QueryOutcome, sources []Source) error {
	o := outcome{Rows: q.GetRows(), Tag: q.GetCommandTag(), Sources: sources}
	for _, n := range q.GetNotices() {
		o.Notices = append(o.Notices, notice{n.GetSeverity(), n.GetSqlstate(), n.GetMessage()})
	}
	for _, p := range q.GetParameters() {
		o.Parameters = append(o.Parameters, parameter{p.GetName(), p.GetType()})
	}
	if e := q.GetError(); e != nil {
		o.Error = &fault{Code: strings.TrimPrefix(e.GetCode().String(), "ERROR_CODE_"), Message: e.GetMessage()}
		if s := e.GetSql(); s != nil {
			o.Error.SQL = &sqlFault{s.GetSqlstate(), uint32(max(s.GetPosition(), 0)), s.GetDetail(), s.GetHint()}
		}
	}
	return w.send(o)
}

func (w *writer) send(o outcome) error {
	text, err := json.Marshal(o)
	if err != nil {
		return err
	}
	if len(text) > maxOutcome {
		o.Notices, o.Parameters, o.Sources = nil, nil, nil
		if text, err = json.Marshal(o); err != nil || len(text) > maxOutcome {
			return fmt.Errorf("an outcome of %d bytes", len(text))
		}
	}
	return w.frame('e', text)
}
