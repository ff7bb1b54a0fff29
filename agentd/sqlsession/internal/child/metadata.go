package child

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgcatalog"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgplan"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
)

const (
	// modeMetadata is the mode in which a statement is described and not run.
	modeMetadata = "metadata"
	// describeTag is the command tag of a statement that was described.
	describeTag = "DESCRIBE"
	// maxDescribed bounds the placeholders of a statement that is described.
	maxDescribed = 1000
)

// describable are the keywords that start what can be described: of these the
// server makes a query tree without planning or running anything.
var describable = words(`select values table with insert update delete merge`)

// describe answers a statement on a source in mode metadata: the server parses it
// and says what it would return. Nothing is planned, nothing is bound, nothing is
// run. The answer is a result without rows, whose schema has the types as SQL
// writes them, and whether a column is known never to be NULL.
func (x *execution) describe() (failure *proto.Error, lost bool) {
	x.discreet = true
	keyword := sqltext.FirstKeyword(x.request.SQL)
	switch {
	case keyword == "explain":
		return explainRefused(), false
	case keyword == "":
		return proto.Errorf(proto.CodeInvalid, "the statement is empty"), false
	case !describable[keyword]:
		return denied(0, "%s is refused: the data source tells metadata only, which it can of SELECT, VALUES, TABLE, WITH, INSERT, UPDATE, DELETE and MERGE", strings.ToUpper(keyword)), false
	case len(x.text.Args) > maxDescribed || namesLength(x.text.Args) > 64*maxDescribed:
		return proto.Errorf(proto.CodeInvalid, "the statement has %d parameters: at most %d, of 64 characters, can be described", len(x.text.Args), maxDescribed), false
	}
	plain := *x.request
	plain.ReadWrite = false
	x.request = &plain
	tree, calls, failure := x.readTree(x.text.Text, x.position)
	if failure != nil {
		return failure, false
	}
	if calls.Kind == pgplan.Index {
		return denied(0, "CREATE INDEX is refused: the data source tells metadata only"), false
	}
	catalog := pgcatalog.Judge(tree)
	if catalog.Reason != "" {
		return denied(x.position(catalog.Offset), "the statement is refused: %s", catalog.Reason), false
	}
	if failure := x.runsNoCheck(calls); failure != nil {
		return failure, false
	}
	d, failure, lost := x.parse(x.text.Text, 0)
	if failure != nil {
		return failure, lost
	}
	if catalog.Catalog && !calls.Writes {
		return x.readCatalog(d, calls), false
	}
	if len(d.parameters) != len(x.text.Args) {
		return proto.Errorf(proto.CodeInvalid, "the statement has %d parameters, and the server knows %d", len(x.text.Args), len(d.parameters)), false
	}
	facts, parameters, failure := x.facts(d)
	if failure != nil {
		return failure, false
	}
	certain := !sqltext.MayAddNulls(x.request.SQL)
	fields := make([]field, len(d.fields))
	for i, f := range d.fields {
		t, ok := pgTypes[f.DataTypeOID]
		if !ok {
			t = text(facts[i].internal)
		}
		fields[i] = field{
			name: string(f.Name), layout: t.layout, binary: t.binary, arrow: t.arrow, notNull: certain && facts[i].notNull,
			meta: []string{"pg.type", t.name, "pg.typmod", strconv.Itoa(int(f.TypeModifier)), "pg.sqltype", facts[i].sql},
		}
	}
	for i, a := range x.text.Args {
		x.parameters = append(x.parameters, frame.ParameterInfo{Name: a.Name, Type: parameters[i].sql})
	}
	if x.st.isStopped() {
		return stopError(x.st.stopReason(), x.request), false
	}
	if err := x.sink.send(frame.Begun, nil); err != nil {
		return proto.Errorf(proto.CodeInternal, "%w", err), false
	}
	x.sink.start()
	x.batch = newFieldBatch(fields, x.sink)
	x.tag = describeTag
	return nil, false
}

// readCatalog runs a statement that reads the catalog alone.
func (x *execution) readCatalog(d description, calls *pgplan.Statement) *proto.Error {
	given := make(map[string]bool)
	for _, p := range x.request.Parameters {
		given[p.Name] = true
	}
	for _, a := range x.text.Args {
		if !given[a.Name] {
			return proto.Errorf(proto.CodeInvalid, "no value is given for parameter %q: a statement that reads the catalog is run", a.Name)
		}
	}
	if len(d.parameters) != len(x.text.Args) {
		return proto.Errorf(proto.CodeInvalid, "the statement has %d parameters, and %d values are given", len(d.parameters), len(x.text.Args))
	}
	if failure := x.ownRelationsOnly(calls); failure != nil {
		return failure
	}
	if failure := x.judgeCalls(calls, "the statement", pgcatalog.Told); failure != nil {
		return failure
	}
	if failure := x.mustOnlyRead(); failure != nil {
		return failure
	}
	x.own = true
	return x.deliver(d.fields)
}

// takesRow: a whole row may be given to an argument of type t.
const takesRow = `(t.typtype OPERATOR(pg_catalog.=) 'c' OR t.typname OPERATOR(pg_catalog.=) ANY ('{record,any,anyelement,anynonarray,anycompatible,anycompatiblenonarray}'))`

// ownRelationsOnly asks the server what the names in the statement mean, which it
// has parsed in this transaction: the relations that it has locked for that must
// all have come with the server, and x.f must be no function of a whole row.
func (x *execution) ownRelationsOnly(calls *pgplan.Statement) *proto.Error {
	rows, refusal, err := x.wire.simple(fmt.Sprintf(`SELECT
 (SELECT pg_catalog.count(*) FROM pg_catalog.pg_locks l WHERE l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()
  AND l.locktype OPERATOR(pg_catalog.=) 'relation' AND l.relation OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid),
 'information_schema' OPERATOR(pg_catalog.=) ANY (pg_catalog.current_schemas(true)),
 (SELECT pg_catalog.min(p.proname::pg_catalog.text) FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) p.proargtypes[0]
  WHERE p.proname OPERATOR(pg_catalog.=) ANY (%s::pg_catalog.name[]) AND `+takesRow+`)`, nameArray(calls.Fields)))
	switch {
	case err != nil:
		return x.broken(err)
	case refusal != nil:
		return x.tell(refusal, 0)
	case len(rows) != 1 || len(rows[0]) != 3:
		return proto.Errorf(proto.CodeInternal, "the server's answer about relations is not understood")
	case rows[0][0] != "0":
		return denied(0, "the statement is refused: a name in it that looks like the catalog's is that of another relation")
	case rows[0][1] != "f":
		return denied(0, "the statement is refused: information_schema is on the search path, where names are not certain: run ALTER ROLE ... RESET search_path")
	case rows[0][2] != "":
		return denied(0, "the statement is refused: .%s may be a call with a whole row: give the column another name", clean(rows[0][2]))
	}
	return nil
}

func namesLength(args []sqltext.Arg) (n int) {
	for _, a := range args {
		n += len(a.Name)
	}
	return n
}

// description is what the server says of a parsed statement.
type description struct {
	fields     []pgproto3.FieldDescription
	parameters []uint32 // types
}

// parse opens the transaction, which is read only, and has the server parse text,
// which has prefix characters in front of the statement's own, and describe it.
// Its error tells nothing that came out of a table.
func (x *execution) parse(text string, prefix int) (d description, failure *proto.Error, lost bool) {
	c := x.wire
	var err error
	if x.request.Session { // what the statement before left
		for _, name := range []string{statementName, classifyName, planName} {
			err = errors.Join(err, c.send(&pgproto3.Close{ObjectType: 'S', Name: name}))
		}
	}
	err = errors.Join(err, c.send(
		&pgproto3.Query{String: x.begin(false)},
		&pgproto3.Parse{Name: statementName, Query: text, ParameterOIDs: x.types},
		&pgproto3.Describe{ObjectType: 'S', Name: statementName},
		&pgproto3.Sync{},
	))
	if err == nil {
		err = c.flush()
	}
	if err != nil {
		return d, x.broken(err), true
	}
	refusal, err := c.untilReady(nil)
	if err != nil || refusal != nil && isFatal(refusal) {
		return d, x.lostError(refusal, err), true
	}
	if refusal != nil {
		return d, x.tell(refusal, 0), false
	}
	refusal, err = c.untilReady(func(t byte, body []byte) error {
		switch t {
		case 't':
			var parameters pgproto3.ParameterDescription
			if err := parameters.Decode(body); err != nil {
				return fmt.Errorf("%w: %v", errProtocol, err)
			}
			d.parameters = append([]uint32(nil), parameters.ParameterOIDs...)
		case 'T':
			var row pgproto3.RowDescription
			if err := row.Decode(body); err != nil {
				return fmt.Errorf("%w: %v", errProtocol, err)
			}
			d.fields = copyFields(row.Fields)
		}
		return nil
	})
	if err != nil || refusal != nil && isFatal(refusal) {
		return d, x.lostError(refusal, err), true
	}
	if refusal != nil {
		return d, x.tell(refusal, prefix), false
	}
	return d, nil, false
}

// fact is what the catalog knows of a column or a parameter.
type fact struct {
	internal string // the type's name, with the schema unless it is pg_catalog
	sql      string // as SQL writes it, with its modifier
	notNull  bool   // the column that it comes from is NOT NULL
}

// facts asks the catalog for all of them at once.
func (x *execution) facts(d description) (columns, parameters []fact, failure *proto.Error) {
	n := len(d.fields) + len(d.parameters)
	if n == 0 {
		return nil, nil, nil
	}
	var ask strings.Builder
	// Every name is qualified: nothing is left to a search_path.
	ask.WriteString("SELECT v.i, n.nspname, t.typname, pg_catalog.format_type(v.t, v.m), COALESCE(a.attnotnull, false) FROM (VALUES ")
	for i := range n {
		if i > 0 {
			ask.WriteByte(',')
		}
		if i < len(d.fields) {
			f := &d.fields[i]
			fmt.Fprintf(&ask, "(%d,%d::pg_catalog.oid,%d,%d::pg_catalog.oid,%d)", i, f.DataTypeOID, f.TypeModifier, f.TableOID, int16(f.TableAttributeNumber))
		} else {
			fmt.Fprintf(&ask, "(%d,%d::pg_catalog.oid,-1,0::pg_catalog.oid,0)", i, d.parameters[i-len(d.fields)])
		}
	}
	ask.WriteString(") v(i, t, m, r, a) JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) v.t" +
		" JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) t.typnamespace" +
		" LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid OPERATOR(pg_catalog.=) v.r AND a.attnum OPERATOR(pg_catalog.=) v.a AND v.a OPERATOR(pg_catalog.>) 0")
	all := make([]fact, n)
	rows, refusal, err := x.wire.simple(ask.String())
	if err != nil {
		return nil, nil, x.broken(err)
	}
	if refusal != nil {
		return nil, nil, x.tell(refusal, 0)
	}
	for _, row := range rows {
		if len(row) != 5 {
			continue
		}
		i, err := strconv.Atoi(row[0])
		if err != nil || i < 0 || i >= n {
			continue
		}
		f := fact{internal: row[2], sql: clean(row[3]), notNull: row[4] == "t"}
		if row[1] != "pg_catalog" {
			f.internal = row[1] + "." + row[2]
		}
		all[i] = f
	}
	return all[:len(d.fields)], all[len(d.fields):], nil
}

// tellable are the conditions whose message is made of names in the statement and
// in the catalog, as the server's parser says it.
var tellable = words(`42601 42P01 42703 42883 42P02 42704 42702 42725 42P09 42P18 42P19 42P20 42P08 42P21 42P22 42701 42712 42803 42804 42809
	42846 42830 42P10 42611 42622 42501 42723 42939 3F000 0A000 428C9 22023`)

// parserFiles are the sources of the server whose messages tellable is about: a
// function that somebody wrote can raise any condition with any text.
func parserFile(name string) bool {
	switch name {
	case "gram.y", "gram.c", "scan.l", "scan.c", "scansup.c", "parser.c", "analyze.c", "namespace.c", "aclchk.c", "rewriteHandler.c", "relation.c", "table.c", "postgres.c":
		return true
	}
	return strings.HasPrefix(name, "parse_") && strings.HasSuffix(name, ".c")
}

// ownWords say what a condition means whose message may hold a value.
var ownWords = map[string]string{
	"22P02": "a value in the statement is not of the type that it should be",
	"22007": "a value in the statement is no date or time of the expected form",
	"22008": "a date or time in the statement is out of range",
	"22003": "a number in the statement is out of range",
	"23514": "a value in the statement is not in its domain",
	"55P03": "the lock on a table could not be had in time",
	"57014": "the statement was cancelled",
	"54001": "the statement is too complex",
	"54000": "the statement is too large",
	"54011": "the statement has too many columns",
	"54023": "a function call in the statement has too many arguments",
}

// tell turns the server's refusal into ours, in full or, where a value must not get
// out, reduced. prefix is how many characters of ours the text begins with.
func (x *execution) tell(e *pgproto3.ErrorResponse, prefix int) *proto.Error {
	if x.discreet {
		return x.reduced(e, prefix)
	}
	own := *e
	own.Position = max(0, e.Position-int32(prefix))
	return x.refused(&own)
}

// reduced turns the server's refusal into one that holds no value: the condition
// and the position, and the message only where it is the parser's own.
func (x *execution) reduced(e *pgproto3.ErrorResponse, prefix int) *proto.Error {
	switch {
	case e.Code == stateQueryCanceled && x.st.stopReason() != 0:
		return stopError(x.st.stopReason(), x.request)
	case e.Code == stateQueryCanceled && time.Since(x.st.started) >= time.Duration(x.request.TimeoutMillis)*time.Millisecond*9/10:
		return timeoutError(x.request)
	case e.Code == stateSyntaxError && e.Routine == "exec_parse_message":
		return denied(0, "the text has more than one statement: send them one by one")
	}
	safe := discreetError(e)
	safe.Position = max(0, e.Position-int32(prefix))
	return sqlError(safe, x.text)
}

// discreetError is what may be told of an error where values must not get out.
func discreetError(e *pgproto3.ErrorResponse) *pgproto3.ErrorResponse {
	safe := &pgproto3.ErrorResponse{Code: e.Code, Position: e.Position, Message: ownWords[e.Code]}
	switch {
	case tellable[e.Code] && parserFile(e.File) && e.Where == "" && e.InternalQuery == "":
		safe.Message, safe.Hint = e.Message, e.Hint
	case safe.Message == "":
		safe.Message = "the reason is not told, as it may hold data"
	}
	return safe
}
