package simulatedcontrolplane

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/apache/arrow-go/v18/arrow/memory"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// serveSQL answers by the first words of the statement's text:
//
//	select 1         one row
//	rows N           N rows, in batches of 1,000
//	echo             the request: its parameters, limits, a row each
//	describe         a description: two columns, two parameters, no rows
//	plan             a plan, if one is asked for
//	update           no rows, a command tag and two notices
//	bad column       a SQL error with position and hint
//	refused          the host's policy says no
//	too many         10 rows, then the row limit
//	vanish           10 rows, then the connection breaks
//	no trailer       10 rows and a clean end without trailer; the history knows
//	no trail at all  the same, and the history says it still runs
//	begin, commit, rollback  likewise; in a session they mean something
//	nothing          an outcome and not a byte
//	wait             10 rows, then waits to be cancelled
//	wait silently    waits to be cancelled before the answer begins
//	endless          rows until the client hangs up
func (s *Server) serveSQL(w http.ResponseWriter, r *http.Request) {
	text, fields, err := decode(r)
	if err != nil {
		proto.WriteHTTPError(w, proto.Errorf(proto.CodeInvalid, "the request is not a RunSQLRequest in JSON: %v", err))
		return
	}
	g, err := agentCalled(r.PathValue("agent"))
	switch {
	case err != nil:
	case !g.Online:
		err = proto.Errorf(proto.CodeAgentOffline, "agent %s is offline: look at agentd on its host", g.Name)
	case r.PathValue("source") != "warehouse":
		err = proto.Errorf(proto.CodeNotFound, "agent %s has no data source %q: see `postern source list`", g.Name, r.PathValue("source"))
	case strings.HasPrefix(text, "refused"):
		err = &proto.Error{Code: proto.CodePolicyDenied, Message: "the host's policy for edge-1/warehouse is read-only: DELETE is refused", SQL: &posternv1.SQLErrorDetail{Position: 1}}
	case strings.HasPrefix(text, "bad column"):
		err = &proto.Error{Code: proto.CodeSQL, Message: `the database refused the statement: column "foo" does not exist (SQLSTATE 42703, position 12)`, SQL: &posternv1.SQLErrorDetail{Sqlstate: "42703", Position: int32(strings.Index(text, "foo") + 1), Hint: `Perhaps you meant "fob".`}}
	}
	session, _ := fields["sessionId"].(string)
	s.mu.Lock()
	if session != "" && s.sessions[session] == nil {
		err = noSession(session)
		session = ""
	}
	s.mu.Unlock()
	if err != nil && session != "" { // the outcome has what became of the transaction, too
		outcome := &posternv1.QueryOutcome{Error: proto.Detail(err)}
		s.after(session, text, outcome)
		w.Header().Set("Trailer", proto.OutcomeTrailer)
		w.WriteHeader(http.StatusOK)
		w.Header().Set(proto.OutcomeTrailer, proto.EncodeOutcome(outcome))
		return
	}
	if err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	q := &posternv1.Query{Id: proto.NewID(proto.QueryPrefix), Agent: g.Name, Source: "warehouse", State: "running", Sql: text}
	stop := make(chan struct{})
	s.mu.Lock()
	s.queries[q.Id], s.cancelled[q.Id] = q, stop
	if open := s.sessions[session]; open != nil {
		open.QueryId = q.Id
	}
	s.mu.Unlock()
	a := &answer{server: s, w: w, r: r, query: q, stop: stop}
	outcome := a.run(text, fields)
	if session != "" {
		s.after(session, text, outcome)
	}
	s.mu.Lock()
	q.State, q.Rows, q.Bytes, q.Duration, q.Error = "done", outcome.Rows, uint64(a.sent), outcome.Duration, outcome.Error
	if outcome.Error != nil {
		q.State = "failed"
	}
	if strings.HasPrefix(text, "no trail at all") {
		q.State = "running"
	}
	s.mu.Unlock()
	switch {
	case strings.HasPrefix(text, "vanish"):
		panic(http.ErrAbortHandler)
	case !strings.HasPrefix(text, "no trail"):
		w.Header().Set(proto.OutcomeTrailer, proto.EncodeOutcome(outcome))
	}
}

// answer is one result under way.
type answer struct {
	server *Server
	w      http.ResponseWriter
	r      *http.Request
	query  *posternv1.Query
	stop   chan struct{}
	arrow  *ipc.Writer
	schema *arrow.Schema
	sent   int
	rows   uint64
}

func (a *answer) run(text string, fields map[string]any) *posternv1.QueryOutcome {
	outcome := &posternv1.QueryOutcome{QueryId: a.query.Id, Duration: durationpb.New(1500 * time.Microsecond)}
	fail := func(code proto.Code, message string) {
		outcome.Error = &posternv1.ErrorDetail{Code: code, Message: message}
	}
	if strings.HasPrefix(text, "wait silently") {
		if a.wait() {
			fail(proto.CodeCancelled, "cancelled")
			a.w.Header().Set("Trailer", proto.OutcomeTrailer)
			a.w.WriteHeader(http.StatusOK)
		}
		return outcome
	}
	h := a.w.Header()
	h.Set("Content-Type", "application/vnd.apache.arrow.stream")
	h.Set(proto.QueryIDHeader, a.query.Id)
	if !strings.HasPrefix(text, "no trail") {
		h.Set("Trailer", proto.OutcomeTrailer)
	}
	a.w.WriteHeader(http.StatusOK)
	switch {
	case strings.HasPrefix(text, "nothing"), strings.HasPrefix(text, "begin"):
		outcome.CommandTag = "BEGIN"
		return outcome
	case strings.HasPrefix(text, "commit"), strings.HasPrefix(text, "rollback"):
		outcome.CommandTag = strings.ToUpper(strings.Fields(text)[0])
		return outcome
	case strings.HasPrefix(text, "update"):
		outcome.CommandTag = "UPDATE 3"
		outcome.Notices = []*posternv1.Notice{{Severity: "NOTICE", Message: "three rows\x1b[31m changed"}, {Severity: "WARNING", Message: "slow"}}
		a.open()
	case strings.HasPrefix(text, "plan"):
		outcome.CommandTag = "EXPLAIN"
		plan := column("QUERY PLAN", arrow.BinaryTypes.String)
		plan.Metadata = arrow.NewMetadata([]string{"pg.type"}, []string{"json"})
		a.open(plan)
		a.row(fmt.Sprintf(`[{"Plan":{"Node Type":"Seq Scan","Relation Name":"or\u001bders","Total Cost":100,"Plan Rows":10,"Filter":"(\"a\" = ?) %v %v"}}]`, fields["explain"], fields["hypotheticalIndexes"]))
	case strings.HasPrefix(text, "describe"):
		outcome.CommandTag = "DESCRIBE"
		outcome.Parameters = []*posternv1.ParameterInfo{{Name: "day", Type: "date"}, {Name: "n", Type: "integer"}}
		id, name := column("id", arrow.PrimitiveTypes.Int64), column("na\x1b[31mme", arrow.BinaryTypes.String)
		id.Nullable = false
		id.Metadata = arrow.NewMetadata([]string{"pg.type", "pg.sqltype"}, []string{"int8", "bigint"})
		name.Metadata = arrow.NewMetadata([]string{"pg.type", "pg.sqltype"}, []string{"varchar", "character varying(40)"})
		a.open(id, name)
	case strings.HasPrefix(text, "echo"):
		a.open(column("name", arrow.BinaryTypes.String), column("value", arrow.BinaryTypes.String))
		for _, key := range []string{"maxRows", "timeout"} {
			if v, ok := fields[key]; ok {
				a.row(key, fmt.Sprint(v))
			}
		}
		list, _ := fields["parameters"].([]any)
		for _, p := range list {
			m := p.(map[string]any)
			name := m["name"]
			if kind, ok := m["type"]; ok {
				name = fmt.Sprint(name, ":", kind)
			}
			a.row(name, m["value"])
		}
	case strings.HasPrefix(text, "select 1"):
		a.open(column("?column?", arrow.PrimitiveTypes.Int32))
		a.row(1)
	default:
		a.open(column("id", arrow.PrimitiveTypes.Int64), column("name", arrow.BinaryTypes.String))
		a.numbered(text, outcome, fail)
	}
	a.arrow.Close() //nolint:errcheck // the client may have gone
	outcome.Rows, outcome.Bytes = a.rows, uint64(a.sent)
	return outcome
}

func (a *answer) numbered(text string, outcome *posternv1.QueryOutcome, fail func(proto.Code, string)) {
	n := 10
	if rest, ok := strings.CutPrefix(text, "rows "); ok {
		n, _ = strconv.Atoi(strings.Fields(rest)[0])
	}
	for left := n; left > 0 && a.r.Context().Err() == nil; left -= 1000 {
		a.numbers(min(left, 1000))
	}
	outcome.CommandTag = fmt.Sprintf("SELECT %d", a.rows)
	switch {
	case strings.HasPrefix(text, "too many"):
		fail(proto.CodeRowLimit, "the result has more than 10 rows: ask for fewer, or raise max_rows on the host")
	case strings.HasPrefix(text, "wait"):
		if a.wait() {
			fail(proto.CodeCancelled, "cancelled")
		}
	case strings.HasPrefix(text, "endless"):
		for a.r.Context().Err() == nil {
			a.numbers(1000)
		}
		a.hungUp()
	}
}

// wait waits to be cancelled; false if the client hung up instead.
func (a *answer) wait() bool {
	ctx, cancel := context.WithTimeout(a.r.Context(), 30*time.Second)
	defer cancel()
	select {
	case <-a.stop:
		return true
	case <-ctx.Done():
		a.hungUp()
		return false
	}
}

func (a *answer) hungUp() {
	a.server.mu.Lock()
	defer a.server.mu.Unlock()
	a.server.hangups++
}

// Write sends bytes of the stream at once.
func (a *answer) Write(p []byte) (int, error) {
	n, err := a.w.Write(p)
	a.sent += n
	return n, err
}

func column(name string, t arrow.DataType) arrow.Field {
	return arrow.Field{Name: name, Type: t, Nullable: true}
}

func (a *answer) open(fields ...arrow.Field) {
	a.schema = arrow.NewSchema(fields, nil)
	a.arrow = ipc.NewWriter(a, ipc.WithSchema(a.schema))
}

func (a *answer) row(values ...any) {
	b := array.NewRecordBuilder(memory.DefaultAllocator, a.schema)
	for i, v := range values {
		switch f := b.Field(i).(type) {
		case *array.StringBuilder:
			if v == nil {
				f.AppendNull()
			} else {
				f.Append(v.(string))
			}
		case *array.Int32Builder:
			f.Append(int32(v.(int)))
		}
	}
	a.write(b)
}

func (a *answer) numbers(n int) {
	b := array.NewRecordBuilder(memory.DefaultAllocator, a.schema)
	for i := range n {
		id := int64(a.rows) + int64(i) + 1
		b.Field(0).(*array.Int64Builder).Append(id)
		b.Field(1).(*array.StringBuilder).Append(fmt.Sprintf("name %d", id))
	}
	a.write(b)
}

func (a *answer) write(b *array.RecordBuilder) {
	record := b.NewRecordBatch()
	a.rows += uint64(record.NumRows())
	a.arrow.Write(record)                   //nolint:errcheck // the client may have gone
	http.NewResponseController(a.w).Flush() //nolint:errcheck // the same
}

// cannedRows are a query of 500 rows of which the first two and the last one are
// kept, or one of three rows, all of them kept.
func cannedRows(id string, include bool) *posternv1.GetQueryResponse {
	q := cannedQuery()
	q.Id, q.State, q.Error, q.Rows = id, "done", nil, 3
	kept := &posternv1.KeptRows{First: 3, Total: 3}
	ids := []int64{1, 2, 3}
	if id == "qry_rows" {
		q.Rows = 500
		kept = &posternv1.KeptRows{First: 2, Last: 1, Total: 500, Cut: 1}
		ids = []int64{1, 2, 500}
	}
	resp := &posternv1.GetQueryResponse{Query: q}
	if !include {
		return resp
	}
	if id == "qry_plan" {
		resp.Rows = &posternv1.KeptRows{Plan: []byte(`[{"Plan":{"Node Type":"Result"}}]`), Total: 1}
		return resp
	}
	var stream bytes.Buffer
	schema := arrow.NewSchema([]arrow.Field{column("id", arrow.PrimitiveTypes.Int64), column("name", arrow.BinaryTypes.String)}, nil)
	writer := ipc.NewWriter(&stream, ipc.WithSchema(schema))
	b := array.NewRecordBuilder(memory.DefaultAllocator, schema)
	for _, id := range ids {
		b.Field(0).(*array.Int64Builder).Append(id)
		b.Field(1).(*array.StringBuilder).Append(fmt.Sprintf("name %d", id))
	}
	writer.Write(b.NewRecordBatch()) //nolint:errcheck // into memory
	writer.Close()                   //nolint:errcheck // into memory
	kept.Arrow = stream.Bytes()
	resp.Rows = kept
	return resp
}
