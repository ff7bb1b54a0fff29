package child

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgcatalog"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgplan"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
)

// What a RunRequest asks for in place of rows.
const (
	explainPlan    = "plan"
	explainAnalyze = "analyze"
)

// The policy's words for what of a plan may be told.
const (
	plansStructure = "structure"
	plansFull      = "full"
	plansAnalyze   = "analyze"
)

const (
	// explainTag is the command tag of a statement whose plan was told.
	explainTag = "EXPLAIN"
	// planName is our prepared EXPLAIN.
	planName = "postern_plan"
	// maxHypothetical bounds the hypothetical indexes of a request.
	maxHypothetical = 20
)

// explain answers with the statement's plan, as far as the policy tells plans. All
// of it is in a transaction that is read only and rolled back, whatever the source
// allows otherwise. The answer is one row of one column, QUERY PLAN, of type json.
func (x *execution) explain() (failure *proto.Error, lost bool) {
	r := x.request
	analyze := r.Explain == explainAnalyze
	if failure := plansAllow(r); failure != nil {
		return failure, false
	}
	if sqltext.FirstKeyword(r.SQL) == "explain" {
		return explainRefused(), false
	}
	plain := *r
	plain.ReadWrite = false
	x.request = &plain
	x.discreet = r.Guard.Mode == modeMetadata
	if x.masking, failure = x.session.masksOf(&r.Guard); failure != nil {
		return failure, false
	}
	calls, failure := x.readStatement(analyze)
	if failure != nil {
		return failure, false
	}
	if failure := x.runsNoCheck(calls); failure != nil {
		return failure, false
	}
	if calls.Kind == pgplan.Select {
		// The planner may call what is behind views and operators, and analyze does.
		x.query = x.text.Text
		if failure, lost := x.guard(); failure != nil {
			return failure, lost
		}
	}
	d, failure, lost := x.parse(x.text.Text, 0)
	switch {
	case failure != nil:
		return failure, lost
	case len(d.parameters) != len(x.text.Args):
		return proto.Errorf(proto.CodeInvalid, "the statement has %d parameters, and %d values are given", len(d.parameters), len(x.text.Args)), false
	}
	// A statement that may not run for what it does with masked columns has no plan.
	if _, failure := x.hide(d.fields); failure != nil {
		return failure, false
	}
	if x.touches && analyze {
		return denied(0, "running the statement for its plan is refused: its tables have masked columns, and what it took tells of them; ask without --analyze"), false
	}
	x.discreet = x.discreet || x.touches
	if analyze {
		if failure := x.mustOnlyRead(); failure != nil {
			return failure, false
		}
	}
	if failure := x.judgeCalls(calls, "the plan", func(string) bool { return false }); failure != nil {
		return failure, false
	}
	if failure := x.hypothesize(); failure != nil {
		return failure, false
	}
	if x.st.isStopped() {
		return stopError(x.st.stopReason(), r), false
	}
	if err := x.sink.send(frame.Begun, nil); err != nil {
		return proto.Errorf(proto.CodeInternal, "%w", err), false
	}
	plan, failure := x.askPlan(d, analyze)
	if failure != nil {
		return failure, false
	}
	if plan, failure = x.narrowed(plan); failure != nil {
		return failure, false
	}
	return x.answerPlan(plan), false
}

// plansAllow holds what is asked for against the policy.
func plansAllow(r *frame.RunRequest) *proto.Error {
	switch {
	case r.Explain != explainPlan && r.Explain != explainAnalyze:
		return proto.Errorf(proto.CodeInvalid, "a plan of kind %q is not known", r.Explain)
	case !slices.Contains([]string{plansStructure, plansFull, plansAnalyze}, r.Guard.Plans):
		return denied(0, "plans are refused: the data source's policy says plans: off")
	case r.Explain == explainAnalyze && r.Guard.Plans != plansAnalyze:
		return denied(0, "running a statement for its plan is refused: the data source's policy says plans: %s; ask without --analyze", r.Guard.Plans)
	case len(r.Indexes) > maxHypothetical:
		return proto.Errorf(proto.CodeInvalid, "%d hypothetical indexes are more than %d", len(r.Indexes), maxHypothetical)
	case len(r.Indexes) > 0 && r.Explain == explainAnalyze:
		return proto.Errorf(proto.CodeInvalid, "a hypothetical index can't be used by a statement that runs: ask without --analyze")
	}
	return nil
}

// readStatement reads the statement, and those of the hypothetical indexes, on
// their trees.
func (x *execution) readStatement(analyze bool) (*pgplan.Statement, *proto.Error) {
	_, all, failure := x.readTree(x.text.Text, x.position)
	switch {
	case failure != nil:
		return nil, failure
	case all.Kind == pgplan.Index:
		return nil, denied(0, "only SELECT, VALUES, TABLE, WITH, INSERT, UPDATE, DELETE and MERGE have a plan")
	case analyze && (all.Kind != pgplan.Select || all.Writes):
		return nil, denied(0, "the statement is refused: only one that reads is run for its plan; ask without --analyze")
	}
	for i, text := range x.request.Indexes {
		_, index, failure := x.readTree(text, func(int) int { return 0 })
		if failure == nil && index.Kind != pgplan.Index {
			failure = proto.Errorf(proto.CodeInvalid, "it is not CREATE INDEX")
		}
		if failure != nil {
			failure.Message, failure.SQL = fmt.Sprintf("hypothetical index %d: %s", i+1, failure.Message), nil
			return nil, failure
		}
		for _, f := range index.Functions {
			f.Offset = -1 // not in the statement's text
			all.Functions = append(all.Functions, f)
		}
		all.Operators = append(all.Operators, index.Operators...)
		all.Fields = append(all.Fields, index.Fields...)
	}
	return all, nil
}

// position is that of a byte of the server's text in the user's; 0 is unknown.
func (x *execution) position(offset int) int {
	return x.text.Position(characters(x.text.Text, offset))
}

// readTree parses one statement and reads what it may call.
func (x *execution) readTree(text string, position func(offset int) int) (*pgtree.Tree, *pgplan.Statement, *proto.Error) {
	ctx, done := context.WithTimeout(context.Background(), time.Duration(x.request.TimeoutMillis)*time.Millisecond)
	defer done()
	tree, err := x.parser.Parse(ctx, text)
	var (
		syntax  *pgtree.SyntaxError
		complex *pgtree.TooComplexError
		refusal *pgplan.Refusal
	)
	switch {
	case errors.As(err, &syntax):
		return nil, nil, sqlError(&pgproto3.ErrorResponse{Code: stateSyntaxError, Message: syntax.Message, Position: int32(syntax.Position)}, x.text)
	case errors.As(err, &complex):
		return nil, nil, denied(0, "the statement is refused: %s", complex)
	case err != nil:
		return nil, nil, proto.Errorf(proto.CodeUnavailable, "%w", err)
	}
	statement, err := pgplan.Read(tree)
	switch {
	case errors.As(err, &refusal):
		return nil, nil, denied(position(refusal.Offset), "the statement is refused: %s", refusal.Message)
	case err != nil:
		return nil, nil, proto.Errorf(proto.CodeInternal, "%w", err)
	}
	return tree, statement, nil
}

// characters is the position in characters from 1 of a byte of text; 0 of none.
func characters(text string, offset int) int {
	if offset < 0 || offset > len(text) {
		return 0
	}
	return utf8.RuneCountInString(text[:offset]) + 1
}

// mustOnlyRead asks the server whether the statement is a query.
func (x *execution) mustOnlyRead() *proto.Error {
	x.query = x.text.Text
	refusal, failure := x.cycle(&pgproto3.Parse{Name: classifyName, Query: classifyPrefix + x.text.Text, ParameterOIDs: x.types})
	if failure == nil && refusal != nil {
		failure = x.refusedClass(refusal)
	}
	return failure
}

// cycle sends one message and takes what comes until the server is ready.
func (x *execution) cycle(message pgproto3.FrontendMessage) (*pgproto3.ErrorResponse, *proto.Error) {
	err := x.wire.send(message, &pgproto3.Sync{})
	if err == nil {
		err = x.wire.flush()
	}
	if err != nil {
		return nil, x.broken(err)
	}
	refusal, err := x.wire.untilReady(nil)
	if err != nil {
		return nil, x.broken(err)
	}
	return refusal, nil
}

// candidatesQuery finds what the names of a statement may call when it is planned:
// functions and fields by name, operators, casts, and what is in the views and row
// security policies of its relations, which are those that this transaction has
// locked by having it parsed. Each %s is an array literal of names. Objects below
// 16384 come with the server: its views and operators are trusted; the cast that it
// makes for each type of ranges (12 is the language internal) only looks at its
// argument.
const candidatesQuery = `WITH rel AS (SELECT DISTINCT l.relation FROM pg_catalog.pg_locks l
 WHERE l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND l.locktype OPERATOR(pg_catalog.=) 'relation'
 AND l.relation OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid),
trees AS (SELECT r.ev_action::pg_catalog.text AS t FROM pg_catalog.pg_rewrite r WHERE r.ev_class OPERATOR(pg_catalog.=) ANY (SELECT relation FROM rel)
 UNION ALL SELECT p.polqual::pg_catalog.text FROM pg_catalog.pg_policy p WHERE p.polrelid OPERATOR(pg_catalog.=) ANY (SELECT relation FROM rel)
 UNION ALL SELECT p.polwithcheck::pg_catalog.text FROM pg_catalog.pg_policy p WHERE p.polrelid OPERATOR(pg_catalog.=) ANY (SELECT relation FROM rel)),
hidden AS (SELECT DISTINCT m.m[2]::pg_catalog.oid AS id, m.m[1] OPERATOR(pg_catalog.=) 'opfuncid' AS operator FROM trees,
 LATERAL pg_catalog.regexp_matches(trees.t, ':(funcid|opfuncid|aggfnoid|winfnoid) ([0-9]+)', 'g') m(m)),
calls AS (` + namedCalls + `
 UNION ALL SELECT 'v', h.id, '' FROM hidden h WHERE NOT h.operator OR h.id OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid)
` + candidatesOf

// namedCalls are what names, operators and casts of a statement may call.
const namedCalls = `SELECT 'f' AS k, p.oid, p.proname AS n FROM pg_catalog.pg_proc p WHERE p.proname OPERATOR(pg_catalog.=) ANY (%s::pg_catalog.name[])
 UNION ALL SELECT 'o', o.oprcode::pg_catalog.oid, o.oprname FROM pg_catalog.pg_operator o WHERE o.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid AND o.oprname OPERATOR(pg_catalog.=) ANY (%s::pg_catalog.name[])
 UNION ALL SELECT 'x', p.oid, p.proname FROM pg_catalog.pg_proc p WHERE p.pronargs OPERATOR(pg_catalog.=) 1 AND p.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid AND p.proname OPERATOR(pg_catalog.=) ANY (%s::pg_catalog.name[])
  AND EXISTS (SELECT FROM pg_catalog.pg_type t WHERE t.oid OPERATOR(pg_catalog.=) p.proargtypes[0] AND t.typtype OPERATOR(pg_catalog.=) ANY ('{c,p}'))
 UNION ALL SELECT 'c', c.castfunc, '' FROM pg_catalog.pg_cast c WHERE c.castfunc OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_proc p WHERE p.oid OPERATOR(pg_catalog.=) c.castfunc AND p.prolang OPERATOR(pg_catalog.=) 12::pg_catalog.oid AND p.prosrc OPERATOR(pg_catalog.=) 'multirange_constructor1')`

// namedCandidatesQuery is the same for a statement that names no relation but the
// server's own.
const namedCandidatesQuery = `WITH calls AS (` + namedCalls + `)
` + candidatesOf

// candidatesOf tells of functions in calls.
const candidatesOf = `SELECT DISTINCT c.k, c.n, n.nspname, p.proname, p.oid OPERATOR(pg_catalog.<) 16384::pg_catalog.oid, p.provolatile, COALESCE(e.extname, '')
FROM calls c JOIN pg_catalog.pg_proc p ON p.oid OPERATOR(pg_catalog.=) c.oid JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) p.pronamespace
LEFT JOIN pg_catalog.pg_depend d ON d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::pg_catalog.oid AND d.objid OPERATOR(pg_catalog.=) p.oid AND d.deptype OPERATOR(pg_catalog.=) 'e'
LEFT JOIN pg_catalog.pg_extension e ON e.oid OPERATOR(pg_catalog.=) d.refobjid LIMIT 10001`

// maxCandidates is how many rows of candidatesQuery are looked at.
const maxCandidates = 10_000

// judgeCalls refuses a statement, or what of it is asked for, that could make the planner call a function which
// is not known to look at its arguments alone. The planner runs what is declared
// immutable or stable on constants, so that a plan can hold what such a function
// read. besides names functions of the server that may be called, too.
func (x *execution) judgeCalls(s *pgplan.Statement, what string, besides func(name string) bool) *proto.Error {
	query := fmt.Sprintf(candidatesQuery, nameArray(s.Functions), nameArray(s.Operators), nameArray(s.Fields))
	rows, refusal, err := x.wire.simple(query)
	switch {
	case err != nil:
		return x.broken(err)
	case refusal != nil:
		return x.tell(refusal, 0)
	case len(rows) >= maxCandidates:
		return denied(0, "the statement is refused: it names too many functions")
	}
	reason, offset, ok := refuseCalls(rows, s, what, x.request.Guard.Functions, besides)
	switch {
	case !ok:
		return proto.Errorf(proto.CodeInternal, "the server's answer about functions is not understood")
	case reason != "":
		return denied(x.position(offset), "%s", reason)
	}
	return nil
}

// refuseCalls says why what candidatesQuery has found must not be called, and where in
// the text; "" if it may. ok is false for an answer that is not understood.
func refuseCalls(rows [][]string, s *pgplan.Statement, what string, functions []string, besides func(name string) bool) (reason string, offset int, ok bool) {
	const remedy = "name it in functions of the data source's policy if it may be run"
	for _, row := range rows {
		if len(row) != 7 {
			return "", -1, false
		}
	}
	for _, row := range rows {
		kind, name := row[0], row[1]
		c := pgplan.Candidate{Schema: row[2], Name: row[3], BuiltIn: row[4] == "t", Volatility: row[5], Extension: row[6]}
		if kind == "v" && c.BuiltIn && (c.Name == "current_setting" || pgcatalog.Told(c.Name)) {
			continue // what whoever made the view or policy lets be told
		}
		if c.Plannable(functions) || c.BuiltIn && besides(c.Name) {
			continue
		}
		full := clean(c.Schema + "." + c.Name)
		switch kind {
		case "f":
			for _, f := range s.Functions {
				if f.Name == name && (f.Schema == "" || f.Schema == c.Schema) {
					return fmt.Sprintf("%s is refused: the statement may call %s, which is not known to be harmless: %s", what, full, remedy), f.Offset, true
				}
			}
		case "o", "x":
			return fmt.Sprintf("%s is refused: it may call %s as %s: %s", what, full, clean(name), remedy), -1, true
		case "c":
			return fmt.Sprintf("%s is refused: the database has a cast by %s: %s", what, full, remedy), -1, true
		default:
			return fmt.Sprintf("%s is refused: a view or a row security policy of the statement's tables calls %s: %s", what, full, remedy), -1, true
		}
	}
	return "", -1, true
}

// nameArray is an array literal of names.
func nameArray(names []pgplan.Name) string {
	seen := make(map[string]bool)
	var list []string
	for _, n := range names {
		// A longer name is none that the server can have: it would be cut there.
		if !seen[n.Name] && len(n.Name) < 64 {
			seen[n.Name] = true
			list = append(list, `"`+strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(n.Name)+`"`)
		}
	}
	return quoteLiteral("{" + strings.Join(list, ",") + "}")
}

func quoteLiteral(text string) string { return "'" + strings.ReplaceAll(text, "'", "''") + "'" }

func quoteIdentifier(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

// hypothesize makes the hypothetical indexes of the request; reset removes them.
func (x *execution) hypothesize() *proto.Error {
	if len(x.request.Indexes) == 0 {
		return nil
	}
	rows, refusal, err := x.wire.simple("SELECT n.nspname FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n" +
		" ON n.oid OPERATOR(pg_catalog.=) e.extnamespace WHERE e.extname OPERATOR(pg_catalog.=) 'hypopg'")
	switch {
	case err != nil:
		return x.broken(err)
	case refusal != nil:
		return x.tell(refusal, 0)
	case len(rows) == 0:
		return proto.Errorf(proto.CodeInvalid, "the database has no extension hypopg, which hypothetical indexes need: CREATE EXTENSION hypopg")
	}
	schema := quoteIdentifier(rows[0][0])
	x.forget = "SELECT " + schema + ".hypopg_reset()"
	for i, text := range x.request.Indexes {
		_, refusal, err := x.wire.simple("SELECT FROM " + schema + ".hypopg_create_index(" + quoteLiteral(text) + ")")
		if err != nil {
			return x.broken(err)
		}
		if refusal != nil {
			failure := x.tell(&pgproto3.ErrorResponse{Code: refusal.Code, Message: refusal.Message, Hint: refusal.Hint, File: refusal.File, Where: refusal.Where, InternalQuery: refusal.InternalQuery}, 0)
			failure.Message = fmt.Sprintf("hypothetical index %d: %s", i+1, failure.Message)
			return failure
		}
	}
	return nil
}

// askPlan has the server explain the statement.
func (x *execution) askPlan(d description, analyze bool) ([]byte, *proto.Error) {
	prefix := "EXPLAIN (FORMAT JSON, VERBOSE) "
	if analyze {
		prefix = "EXPLAIN (FORMAT JSON, VERBOSE, ANALYZE, BUFFERS) "
	}
	bound := make([][]byte, len(x.text.Args))
	for i, a := range x.text.Args {
		if a.Text != nil {
			bound[i] = append([]byte{}, *a.Text...)
		}
	}
	err := x.wire.send(
		&pgproto3.Parse{Name: planName, Query: prefix + x.text.Text, ParameterOIDs: d.parameters},
		&pgproto3.Bind{PreparedStatement: planName, Parameters: bound},
		&pgproto3.Execute{},
		&pgproto3.Sync{},
	)
	if err == nil {
		err = x.wire.flush()
	}
	if err != nil {
		return nil, x.broken(err)
	}
	plan, refusal, err := x.wire.document(pgplan.MaxPlan)
	switch {
	case err != nil:
		return nil, x.broken(err)
	case refusal != nil:
		return nil, x.tell(refusal, len(prefix))
	case plan == nil:
		return nil, proto.Errorf(proto.CodeByteLimit, "the plan has more than %d bytes", pgplan.MaxPlan)
	}
	if reason := x.st.stopReason(); reason != 0 {
		return nil, stopError(reason, x.request)
	}
	return plan, nil
}

// document reads to the end of a cycle whose rows have one column, the text of
// which is returned; nil when it has more than limit bytes.
func (c *wire) document(limit int) (text []byte, refusal *pgproto3.ErrorResponse, err error) {
	text = []byte{}
	for {
		t, size, err := c.header()
		if err != nil {
			return nil, refusal, err
		}
		if t != 'D' || size > limit || text == nil || len(text)+size > limit {
			if t == 'D' {
				text = nil
				if err := c.skip(5 + size); err != nil {
					return nil, refusal, err
				}
				continue
			}
			t, body, err := c.message()
			if err != nil {
				if refusal != nil {
					return nil, refusal, nil
				}
				return nil, nil, err
			}
			switch t {
			case 'Z':
				return text, refusal, nil
			case 'E':
				refusal = decodeError(body)
			}
			continue
		}
		if err := c.need(5 + size); err != nil {
			return nil, refusal, err
		}
		body := c.in[c.r+5 : c.r+5+size]
		c.r += 5 + size
		if len(body) < 6 || binary.BigEndian.Uint16(body) != 1 || int(int32(binary.BigEndian.Uint32(body[2:]))) != len(body)-6 {
			return nil, refusal, fmt.Errorf("%w: a plan of other than one column", errProtocol)
		}
		text = append(text, body[6:]...)
		if c.r == c.w && len(c.in) > inBuffer {
			c.in, c.r, c.w = make([]byte, inBuffer), 0, 0
		}
	}
}

// narrowed makes of the server's plan what the policy lets out. Of tables with masked
// columns it is the structure at most: an estimate tells how often a value occurs.
func (x *execution) narrowed(plan []byte) ([]byte, *proto.Error) {
	var err error
	if x.request.Guard.Plans == plansStructure || x.touches {
		numbers := pgplan.Magnitude
		if x.discreet {
			numbers = pgplan.NoNumbers
		}
		plan, err = pgplan.Structure(plan, numbers)
	} else {
		var texts func(string) string
		if x.masking != nil {
			texts = x.masking.texts.String
		}
		plan, err = pgplan.Check(plan, texts)
	}
	if err != nil {
		return nil, proto.Errorf(proto.CodeInternal, "%w", err)
	}
	return plan, nil
}

// answerPlan sends the plan as a result.
func (x *execution) answerPlan(plan []byte) *proto.Error {
	x.sink.start()
	x.batch = newFieldBatch([]field{{
		name: "QUERY PLAN", layout: layoutText, arrow: arrow.BinaryTypes.String, notNull: true, meta: []string{"pg.type", "json", "pg.typmod", "-1"},
	}}, x.sink)
	row := binary.BigEndian.AppendUint32([]byte{0, 1}, uint32(len(plan)))
	row = append(row, plan...)
	if !x.batch.fits(x.request.MaxBytes, len(row), row) {
		return proto.Errorf(proto.CodeByteLimit, "the plan has more than %d bytes", x.request.MaxBytes)
	}
	x.tag = explainTag
	if err := x.batch.add(row); err != nil {
		return proto.Errorf(proto.CodeInternal, "%w", err)
	}
	if x.request.KeepFirst+x.request.KeepLast > 0 && len(plan) <= frame.MaxPlan {
		// A longer one is only not kept: the answer is as good.
		if err := x.sink.send(frame.Plan, plan); err != nil {
			return proto.Errorf(proto.CodeInternal, "%w", err)
		}
	}
	return nil
}
