package pgproxy

import (
	"context"
	"encoding/binary"
	"fmt"
	"strings"
	"time"

	pgquery "github.com/pganalyze/pg_query_go/v6"

	"github.com/jackc/pgx/v5/pgproto3"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
)

// Explain is an EXPLAIN of the client's: the word and its options are ours. The plan is
// asked for by Planner while the text is judged, in a transaction that is read only
// and rolled back; to the server goes, in the statement's place, a SELECT of the plan's
// lines, so that everything else is as with any statement.
type Explain struct {
	Analyze, Verbose, Costs, Buffers, Timing, Summary bool
	JSON                                              bool
}

// Planner asks for plans. text is the statement behind EXPLAIN, tree its tree. The lines
// are those of the answer; one, in JSON.
type Planner interface {
	Plan(ctx context.Context, scope Scope, text string, tree *pgtree.Tree, e Explain) (lines []string, refusal *Refusal)
}

// Scope is the client's own connection, outside of its transaction or in a savepoint that
// is rolled back, read only and with the source's limit of time.
type Scope interface {
	Asker
	// Begin opens it; the Proxy closes it. Until then nothing but Asker may be used.
	Begin() error
	// Describe has the server parse a statement, and returns its columns.
	Describe(sql string) ([]pgproto3.FieldDescription, error)
	// Rows runs a statement and returns the first column of its rows; nil if those have
	// more than limit bytes.
	Rows(sql string, limit int) ([]string, error)
}

// ServerError is an ErrorResponse of the server's, its body.
type ServerError struct{ Body []byte }

// Error implements error.
func (e *ServerError) Error() string { return serverError(e.Body).GetMessage() }

// explainOptions reads the options of an EXPLAIN.
func explainOptions(stmt *pgquery.ExplainStmt) (Explain, *Refusal) {
	e := Explain{Costs: true}
	var timing, summary, buffers *bool
	for _, o := range stmt.GetOptions() {
		d := o.GetDefElem()
		name := strings.ToLower(d.GetDefname())
		on, word := true, ""
		switch a := d.GetArg().GetNode().(type) {
		case nil:
		case *pgquery.Node_String_:
			word = strings.ToLower(a.String_.GetSval())
		case *pgquery.Node_Boolean:
			on = a.Boolean.GetBoolval()
		case *pgquery.Node_Integer:
			word = fmt.Sprint(a.Integer.GetIval())
		default:
			return e, refuse(stateValue, "EXPLAIN option %s: its value is not understood", strings.ToUpper(name))
		}
		if name != "format" {
			switch word {
			case "", "true", "on", "1":
			case "false", "off", "0":
				on = false
			default:
				return e, refuse(stateValue, "EXPLAIN option %s: %q is neither on nor off", strings.ToUpper(name), clip(word, 64))
			}
		}
		switch name {
		case "analyze":
			e.Analyze = on
		case "verbose":
			e.Verbose = on
		case "costs":
			e.Costs = on
		case "buffers":
			buffers = &on
		case "timing":
			timing = &on
		case "summary":
			summary = &on
		case "format":
			switch word {
			case "text":
			case "json":
				e.JSON = true
			default:
				return e, refuse(stateUnsupported, "EXPLAIN option FORMAT: %q is not supported: TEXT and JSON are", clip(word, 64))
			}
		default:
			return e, refuse(stateUnsupported, "EXPLAIN option %s is not supported: ANALYZE, VERBOSE, COSTS, BUFFERS, TIMING, SUMMARY and FORMAT are", strings.ToUpper(clip(name, 64)))
		}
	}
	e.Timing, e.Summary = e.Analyze, e.Analyze
	for from, to := range map[*bool]*bool{buffers: &e.Buffers, timing: &e.Timing, summary: &e.Summary} {
		if from != nil {
			*to = *from
		}
	}
	if e.Timing && !e.Analyze {
		return e, refuse(stateValue, "EXPLAIN option TIMING requires ANALYZE")
	}
	return e, nil
}

// explained is the statement behind EXPLAIN and its options, and where it begins in text.
func explained(text string) (string, int) {
	depth, word := 0, false
	options := 0 // 0: none yet, 1: in their brackets, 2: over
	for t := range sqltext.Tokens(text) {
		switch {
		case t.Kind == sqltext.Space, !word && t.Text == ";":
			continue
		case !word:
			if !strings.EqualFold(t.Text, "explain") {
				return "", 0
			}
			word = true
			continue
		case options == 1:
			switch t.Text {
			case "(":
				depth++
			case ")":
				if depth--; depth == 0 {
					options = 2
				}
			}
			continue
		case options == 0 && t.Kind == sqltext.Word && (strings.EqualFold(t.Text, "analyze") || strings.EqualFold(t.Text, "analyse") || strings.EqualFold(t.Text, "verbose")):
			continue
		case options == 0 && t.Text == "(" && !startsQuery(text[t.Start:]):
			depth, options = 1, 1
			continue
		}
		return text[t.Start:], t.Start
	}
	return "", 0
}

// startsQuery tells whether a bracket is a query's, as in EXPLAIN (SELECT 1).
func startsQuery(text string) bool {
	for t := range sqltext.Tokens(text) {
		switch {
		case t.Kind == sqltext.Space, t.Text == "(":
		default:
			switch strings.ToLower(t.Text) {
			case "select", "with", "values", "table":
				return true
			}
			return false
		}
	}
	return false
}

// explain answers an EXPLAIN: the result is what goes to the server in its place.
func (p *Proxy) explain(ctx context.Context, text string, stmt *pgquery.ExplainStmt) (string, *Refusal) {
	options, refusal := explainOptions(stmt)
	if refusal != nil {
		return "", refusal
	}
	inner, offset := explained(text)
	tree, err := p.config.Parser.Parse(ctx, inner)
	if err != nil || len(tree.GetStmts()) != 1 {
		return "", refuse(stateDenied, "EXPLAIN is refused: the statement behind it is not understood")
	}
	inner, _ = slice(inner, tree.Stmts[0])
	tree, err = p.config.Parser.Parse(ctx, inner) // its offsets are those of inner now
	switch {
	case err != nil || len(tree.GetStmts()) != 1:
		return "", refuse(stateDenied, "EXPLAIN is refused: the statement behind it is not understood")
	case hasParameter(tree.Stmts[0].GetStmt().ProtoReflect()):
		return "", refuse(stateUnsupported, "EXPLAIN of a statement with parameters is not supported: write the values")
	case p.open:
		return "", refuse(stateUnsupported, "EXPLAIN within a pipeline is not supported: send a Sync first")
	}
	p.begin()
	defer p.end()
	st := p.running(part{sql: strings.TrimSpace(strings.TrimRight(strings.TrimSpace(text), ";"))}, nil)
	p.current = st
	p.announced.Store(false)
	p.shownSeq.Store(st.seq)
	p.budget.Store(int64(p.config.Timeout))
	s := &scope{p: p}
	lines, refusal := p.config.Planner.Plan(ctx, s, inner, tree, options)
	if p.stopped.Load() {
		if reason := p.stopError(); refusal != nil && reason != nil {
			refusal = reason
		}
		p.end() // no cancel request may meet what undoes it
		p.begin()
	}
	s.close()
	p.current = nil
	if refusal != nil {
		if refusal.Position > 0 {
			refusal.Position += len([]rune(text[:offset]))
		}
		if s.ran {
			p.finish(st, "", refusal.detail())
			refusal.logged = true
		}
		return "", refusal
	}
	if p.broken == nil {
		p.finish(st, "EXPLAIN", nil)
	}
	if options.JSON {
		return "SELECT " + quoteLiteral(strings.Join(lines, "\n")) + `::pg_catalog.json AS "QUERY PLAN"`, nil
	}
	var b strings.Builder
	b.WriteString(`SELECT v."QUERY PLAN" FROM (VALUES `)
	for i, line := range append(lines[:len(lines):len(lines)], make([]string, max(0, 1-len(lines)))...) {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString("(" + quoteLiteral(line) + "::pg_catalog.text)")
	}
	b.WriteString(`) v ("QUERY PLAN")`)
	return b.String(), nil
}

func quoteLiteral(text string) string { return "'" + strings.ReplaceAll(text, "'", "''") + "'" }

func hasParameter(m protoreflect.Message) bool {
	if _, ok := m.Interface().(*pgquery.ParamRef); ok {
		return true
	}
	found := false
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.Message() == nil:
		case f.IsList():
			for i := range v.List().Len() {
				found = found || hasParameter(v.List().Get(i).Message())
			}
		default:
			found = hasParameter(v.Message())
		}
		return !found
	})
	return found
}

// scope implements Scope.
type scope struct {
	p    *Proxy
	open bool
	ran  bool // something of the client's went to the server
	own  bool // the transaction is ours
}

// Ask implements Asker.
func (s *scope) Ask(ctx context.Context, sql string, parameters ...string) ([][]string, error) {
	if !s.open {
		rows, err := s.p.Ask(ctx, sql, parameters...)
		s.p.begin() // Ask has marked the end of what it did
		return rows, err
	}
	return s.script(question{sql, parameters})
}

type question struct {
	sql        string
	parameters []string
}

func ask(sql string) question { return question{sql: sql} }

// Begin implements Scope.
func (s *scope) Begin() error {
	limit := ask(fmt.Sprintf("SET LOCAL statement_timeout = %d", max(1, s.p.config.Timeout.Milliseconds())))
	s.own = s.p.tx == 'I'
	s.open, s.ran = true, true
	s.p.current.started = time.Now()
	s.p.startedAt.Store(s.p.current.started.UnixNano())
	var err error
	if s.own {
		_, err = s.script(ask("BEGIN READ ONLY"), limit)
	} else {
		_, err = s.script(ask("SAVEPOINT postern_plan"), ask("SET LOCAL transaction_read_only = on"), limit)
	}
	return err
}

// close undoes all of it.
func (s *scope) close() {
	if !s.open || s.p.broken != nil {
		return
	}
	s.p.startedAt.Store(0)
	var err error
	if s.own {
		_, err = s.script(ask("ROLLBACK"))
	} else {
		_, err = s.script(ask("ROLLBACK TO SAVEPOINT postern_plan"), ask("RELEASE SAVEPOINT postern_plan"))
	}
	if err != nil && s.p.broken == nil {
		s.p.broken = fail{refuse(stateUnavailable, "terminating connection: the state of the transaction is not known: %s", oneLine(err))}
	}
	s.p.endBulk()
}

// script runs statements of ours and returns all their rows.
func (s *scope) script(all ...question) ([][]string, error) {
	p := s.p
	b := appendMessage(p.batch[:0], 'C', "P"+ours) // one that failed left it open
	for _, q := range all {
		b = appendQuestion(b, q.sql, q.parameters...)
	}
	b = appendMessage(b, 'S')
	_, err := p.conn.Write(b)
	p.batch = b[:0]
	var rows [][]string
	if err == nil {
		rows, err = p.askAnswers(3 * len(all))
	}
	s.noteLost(err)
	return rows, err
}

func (s *scope) noteLost(err error) {
	if _, refused := asRefusal(err); err != nil && !refused && s.p.broken == nil {
		s.p.broken = err
	}
}

// Describe implements Scope.
func (s *scope) Describe(sql string) (fields []pgproto3.FieldDescription, _ error) {
	b := appendMessage(nil, 'C', "S"+ours)
	b = append(b, s.p.parseMessage(ours, sql)...)
	b = appendMessage(append(b, 0, 0), 'D', "S"+ours)
	err := s.exchange(appendMessage(b, 'S'), func(t byte, body []byte) error {
		if t != 'T' {
			return nil
		}
		var row pgproto3.RowDescription
		if err := row.Decode(body); err != nil {
			return fmt.Errorf("%w: %v", errServer, err)
		}
		for _, f := range row.Fields {
			f.Name = append([]byte(nil), f.Name...)
			fields = append(fields, f)
		}
		return nil
	})
	return fields, err
}

// Rows implements Scope.
func (s *scope) Rows(sql string, limit int) (rows []string, _ error) {
	size, long := 0, false
	err := s.exchange(appendMessage(appendQuestion(appendMessage(nil, 'C', "P"+ours), sql), 'S'), func(t byte, body []byte) error {
		if t != 'D' || long {
			return nil
		}
		if len(body) < 6 || binary.BigEndian.Uint16(body) < 1 {
			return errServer
		}
		n := int(int32(binary.BigEndian.Uint32(body[2:])))
		if size += len(body); size > limit || n > len(body)-6 {
			long = true
			return nil
		}
		rows = append(rows, string(body[6:6+max(n, 0)]))
		return nil
	})
	if long {
		return nil, err
	}
	return rows, err
}

// maxExchanged bounds one message that is held whole, in bytes; the rest of a longer one
// is dropped.
const maxExchanged = 9 << 20

// exchange sends messages and looks at all that comes until the server is ready.
func (s *scope) exchange(b []byte, visit func(t byte, body []byte) error) error {
	p := s.p
	if _, err := p.conn.Write(b); err != nil {
		s.noteLost(err)
		return err
	}
	var failure error
	for {
		t, size, err := p.header()
		if err != nil {
			s.noteLost(err)
			return err
		}
		known, err := p.aside(t, size)
		if known && err == nil {
			continue
		}
		held := min(size, maxExchanged)
		if err == nil {
			err = p.need(5 + held)
		}
		if err != nil {
			s.noteLost(err)
			return err
		}
		body := p.b[p.r+5 : p.r+5+held]
		switch t {
		case 'E':
			if v := severity(body); v == "FATAL" || v == "PANIC" {
				p.lastWord(body)
				_ = p.through(5 + size)
				p.pass()
				s.noteLost(errEnded)
				return errEnded
			}
			if failure == nil {
				failure = &ServerError{append([]byte(nil), body...)}
			}
		case 'Z':
			if size == 1 {
				p.tx = body[0]
			}
		default:
			if err := visit(t, body); err != nil {
				s.noteLost(err)
				return err
			}
		}
		if err := p.skip(5 + size); err != nil {
			s.noteLost(err)
			return err
		}
		if t == 'Z' {
			return failure
		}
	}
}

// plansOff is why an EXPLAIN is refused.
func plansOff() *Refusal {
	return &Refusal{SQLState: stateDenied, Message: "EXPLAIN is refused: plans are off on this data source", Code: proto.CodePolicyDenied}
}
