package child

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-sql-driver/mysql"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/mysqlguard"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
)

// mysqlExecution is one statement on its way.
type mysqlExecution struct {
	*mysqlSession
	request *frame.RunRequest
	st      *statement
	text    *sqltext.Statement
	// show is what the statement asks if it has the words of SHOW, and schema the
	// database that it is about.
	show   *mysqlguard.Show
	schema string
	done   frame.DoneReply

	// What follows is for sessions that stay: see interact. explicit tells that a
	// transaction of the user's is open, began that one of ours was opened, begun that the
	// statement itself is on its way; verb is what is run in place of
	// the text, and ends that it was COMMIT or ROLLBACK.
	explicit, began, begun, ends bool
	verb                         *mysqlguard.Verb
	// lineage is set where the statement may read masked columns.
	lineage *mysqlLineage
}

// run is engine's.
func (s *mysqlSession) run(r *frame.RunRequest, st *statement) (done frame.DoneReply, lost bool) {
	x := &mysqlExecution{mysqlSession: s, request: r, st: st}
	if !r.Session && (r.ReadWrite || len(r.Guard.Functions) > 0) {
		s.spent = true
	}
	x.explicit = r.Session && s.inTransaction()
	timer := time.AfterFunc(time.Duration(r.TimeoutMillis)*time.Millisecond, func() { st.stop(frame.TimedOut) })
	defer timer.Stop()
	masking, failure := masksOf(&s.masking, &r.Guard)
	if failure == nil {
		failure, lost = x.execute()
	}
	if r.Session && !lost {
		failure = x.settle(failure, x.explicit)
		x.done.Transaction = s.transaction()
	}
	masking.scrubReply(&x.done, failure)
	x.done.Error = frame.FromError(failure)
	if lost {
		return frame.DoneReply{Error: x.done.Error}, true
	}
	return x.done, false
}

// unenforced refuses what an engine does not enforce. The configuration refuses it
// first; this is for the day on which it forgets. modes are those that the engine has
// besides read-only and read-write.
func unenforced(product string, r *frame.RunRequest, modes ...string) *proto.Error {
	g, what := &r.Guard, ""
	switch {
	case g.Mode != "read-only" && g.Mode != "read-write" && g.Mode != "" && !slices.Contains(modes, g.Mode):
		what = "mode " + g.Mode
	case !slices.Contains([]string{"", "off", plansStructure, plansFull}, g.Plans):
		what = "plans: " + g.Plans
	case len(g.WriteSchemas) > 0 || len(g.WriteStatements) > 0:
		what = "write"
	case columnMasks(g) && r.ReadWrite:
		what = "mask for columns and lets statements write"
	default:
		return checkColumnMasks(g, product)
	}
	return denied(0, "the statement is refused: the data source's policy has %s, which is not supported for %s", what, product)
}

func (x *mysqlExecution) execute() (failure *proto.Error, lost bool) {
	r := x.request
	metadata := r.Guard.Mode == modeMetadata
	if failure := unenforced("MySQL", r, modeMetadata); failure != nil {
		return failure, false
	}
	if r.Explain != "" || len(r.Indexes) > 0 {
		if failure := x.planRefused(); failure != nil {
			return failure, false
		}
	}
	values := make([]sqltext.Value, len(r.Parameters))
	for i, p := range r.Parameters {
		values[i] = sqltext.Value{Name: p.Name, Text: p.Value, Type: p.Type}
	}
	dialect := *sqltext.MySQL
	dialect.Loose = metadata
	var err error
	if x.text, err = dialect.Bind(r.SQL, values); err != nil {
		return proto.Errorf(proto.CodeInvalid, "%w", err), false
	}
	arguments, failure := argumentValues(x.text.Args)
	if failure != nil {
		return failure, false
	}
	ctx := context.Background() // st ends what takes too long
	if r.Session {
		if metadata {
			return denied(0, "the data source is in mode metadata, in which no statement runs: sessions make no sense"), false
		}
		if done, failure, lost := x.interact(ctx, len(arguments)); done {
			return failure, lost
		}
	}
	if r.Explain != "" {
		return x.explain(ctx, arguments)
	}
	isShow := mysqlguard.IsShow(x.text.Text)
	if metadata && !isShow {
		return x.describe(ctx)
	}
	tell := func(err error) *proto.Error { return x.failure(err, r, x.st, x.text) }
	if metadata {
		tell = x.reduced
	}
	if failure, lost := x.judge(ctx, isShow); failure != nil {
		return failure, lost
	}
	text := x.text.Text
	if x.show != nil {
		text = x.show.Text
	}
	if x.verb != nil {
		text = x.verb.SQL
	}
	if x.explicit {
		if failure := x.holds(); failure != nil {
			return failure, false
		}
	}
	if err := x.begin(ctx); err != nil {
		return tell(err), isBroken(err)
	}
	var said []mysqlColumn
	if x.lineage != nil {
		described, err := x.prepareOnly(text)
		if err != nil {
			x.spent = x.spent || isBroken(err)
			return x.reduced(err), isBroken(err)
		}
		said, tell = described.columns, x.reduced
	}
	prepared, err := x.conn.(driver.ConnPrepareContext).PrepareContext(ctx, text)
	if err != nil {
		return tell(err), isBroken(err)
	}
	defer func() { _ = prepared.Close() }()
	if n := prepared.NumInput(); n != len(arguments) {
		return proto.Errorf(proto.CodeInvalid, "the statement has %d parameters, and %d values are given", n, len(arguments)), false
	}
	if x.st.isStopped() {
		return stopError(x.st.stopReason(), r), false
	}
	if err := x.sink.send(frame.Begun, nil); err != nil {
		return proto.Errorf(proto.CodeInternal, "%w", err), false
	}
	x.begun = true
	rows, err := prepared.(driver.StmtQueryContext).QueryContext(ctx, arguments)
	if err != nil {
		return tell(err), false
	}
	var c cursor
	var fields []field
	if x.show != nil {
		c, fields = x.newShowCursor(rows, x.show, x.schema)
	} else {
		own, described := newMySQLCursor(rows)
		if x.lineage != nil {
			if failure := x.hide(ctx, x.lineage, said, own); failure != nil {
				_ = rows.Close()
				return failure, false
			}
		}
		c, fields = own, described
	}
	x.masking.look(fields)
	f := newFeed(x.sink, r, x.st, fields, c)
	err = f.run()
	if closing := rows.Close(); err == nil {
		err = closing
	}
	switch reason := x.st.stopReason(); {
	case f.value != nil:
		failure = proto.Errorf(proto.CodeInvalid, "%w", f.value)
	case err != nil:
		failure = tell(err)
	case reason != 0:
		failure = stopError(reason, r)
	}
	if failure == nil {
		failure = x.finish(ctx, len(fields))
	}
	x.done.Rows, failure = f.end(failure)
	return failure, false
}

// judge refuses what the policy does not allow, before the database hears of it. The
// text is the one with its placeholders, so that an identifier that a value gave is
// looked at like any other.
func (x *mysqlExecution) judge(ctx context.Context, isShow bool) (failure *proto.Error, lost bool) {
	text, r := x.text.Text, x.request
	var uses mysqlguard.Uses
	switch {
	case x.verb != nil:
		if r.ReadWrite {
			return nil, false
		}
		for _, query := range x.verb.Queries {
			more, refusal := mysqlguard.Session("SELECT ("+query+"\n)", r.Guard.Functions)
			if refusal != nil {
				refusal.Position = 0 // of another text
				return x.denial(refusal), false
			}
			uses.Names, uses.Calls = append(uses.Names, more.Names...), append(uses.Calls, more.Calls...)
		}
		for i := range uses.Calls {
			uses.Calls[i].Position = 0
		}
	case isShow:
		show, refusal := mysqlguard.ParseShow(text)
		if refusal != nil {
			if r.ReadWrite {
				return x.judgeReadWrite(text), false
			}
			return x.denial(refusal), false
		}
		schema, failure := x.judgeShow(show)
		if failure != nil {
			return failure, false
		}
		x.show, x.schema = show, schema
		// The server prepares a view to tell of it.
		uses.Names = show.Names()
		if r.ReadWrite {
			return nil, false
		}
	case r.ReadWrite:
		return x.judgeReadWrite(text), false
	default:
		var refusal *mysqlguard.Refusal
		judge := mysqlguard.ReadOnly
		if r.Session {
			judge = mysqlguard.Session
		}
		if uses, refusal = judge(text, r.Guard.Functions); refusal != nil {
			return x.denial(refusal), false
		}
	}
	failure, views, names, err := x.lookUp(ctx, uses)
	if err == nil && failure == nil {
		x.lineage, err = x.follow(ctx, names, views)
	}
	if err != nil {
		return x.failure(err, r, x.st, nil), isBroken(err)
	}
	if failure == nil && x.lineage != nil && x.verb != nil {
		failure = denied(0, "the statement is refused: it sets a variable to what may be made of masked columns")
	}
	return failure, false
}

func (x *mysqlExecution) judgeReadWrite(text string) *proto.Error {
	if refusal := mysqlguard.ReadWrite(text, x.request.Session); refusal != nil {
		return x.denial(refusal)
	}
	return nil
}

// denial is a refusal with its position in the text that the user gave.
func (x *mysqlExecution) denial(r *mysqlguard.Refusal) *proto.Error {
	own := *r
	if own.Position > 0 {
		own.Position = x.text.Position(own.Position)
	}
	return mysqlDenial(&own)
}

func mysqlDenial(r *mysqlguard.Refusal) *proto.Error {
	if r.Reason == "the statement is empty" {
		return proto.Errorf(proto.CodeInvalid, "%s", r.Reason)
	}
	return denied(r.Position, "%s", r.Reason)
}

// begin opens the statement's transaction.
func (x *mysqlExecution) begin(ctx context.Context) error {
	if x.timeout != x.request.TimeoutMillis {
		// The server ends what is too slow also when nobody asks it to any more.
		set := fmt.Sprintf("SET SESSION max_execution_time = %d", x.request.TimeoutMillis)
		if x.mariadb {
			set = "SET SESSION max_statement_time = " + strconv.FormatFloat(float64(x.request.TimeoutMillis)/1000, 'f', 3, 64)
		}
		if err := x.tell(ctx, set); err != nil {
			return err
		}
		x.timeout = x.request.TimeoutMillis
	}
	if x.explicit {
		return nil
	}
	x.began = true
	if !x.request.ReadWrite {
		return x.tell(ctx, "START TRANSACTION READ ONLY")
	}
	// DDL ends a transaction and goes by the session's.
	if err := x.tell(ctx, "SET SESSION TRANSACTION READ WRITE"); err != nil {
		return err
	}
	return x.tell(ctx, "START TRANSACTION READ WRITE")
}

// finish makes a read-write statement's changes last.
func (x *mysqlExecution) finish(ctx context.Context, columns int) *proto.Error {
	if x.verb != nil {
		x.done.Tag = x.verb.Word()
	}
	if !x.request.ReadWrite {
		return nil
	}
	// What the server counted and warned of is told by the next answer alone.
	counted, err := x.ask(ctx, "SELECT ROW_COUNT(), @@warning_count")
	if err == nil && columns == 0 && len(counted) == 1 {
		x.done.Tag = strings.ToUpper(sqltext.FirstWord(sqltext.MySQL, x.request.SQL))
		if n, err := strconv.ParseInt(counted[0][0], 10, 64); err == nil && n >= 0 {
			x.done.Tag += " " + counted[0][0]
		}
	}
	if err == nil && len(counted) == 1 && counted[0][1] != "0" {
		// Without strict modes the server changes values and says no more of it than this.
		warnings, _ := x.ask(ctx, fmt.Sprintf("SHOW WARNINGS LIMIT %d", maxNotices))
		for _, w := range warnings {
			x.done.Notices = append(x.done.Notices, frame.Notice{
				Severity: strings.ToUpper(clean(w[0])), Message: frame.Clip(fmt.Sprintf("%s (error %s)", clean(w[2]), clean(w[1])), 1<<10),
			})
		}
	}
	if err == nil && !x.explicit {
		err = x.tell(ctx, "COMMIT")
	}
	var refusal *mysql.MySQLError
	switch {
	case errors.As(err, &refusal):
		return x.failure(err, x.request, x.st, nil)
	case err != nil:
		x.spent = true
		return proto.Errorf(proto.CodeSourceUnreachable, "the connection to %s was lost during COMMIT: whether the statement took effect is unknown", x.name())
	}
	return nil
}

// isBroken tells whether an error is the connection's and not the statement's.
func isBroken(err error) bool {
	var refusal *mysql.MySQLError
	return !errors.As(err, &refusal) || refusal.Number == mysqlKilled
}

// argumentTypes are what a parameter's type means where the database has no types of
// its own for parameters: 'i' an integer, 'f' a float, 'b' a boolean, 't' a text.
var argumentTypes = map[string]byte{
	"": 't', "int2": 'i', "int4": 'i', "int8": 'i', "smallint": 'i', "int": 'i', "integer": 'i', "bigint": 'i',
	"float4": 'f', "float8": 'f', "real": 'f', "double": 'f', "double precision": 'f', "bool": 'b', "boolean": 'b',
	"numeric": 't', "decimal": 't', "text": 't', "varchar": 't', "char": 't', "date": 't', "time": 't', "timestamp": 't', "timestamptz": 't',
	"json": 't', "uuid": 't',
}

// argumentValues are the values to bind.
func argumentValues(args []sqltext.Arg) ([]driver.NamedValue, *proto.Error) {
	values := make([]driver.NamedValue, len(args))
	for i, a := range args {
		values[i].Ordinal = i + 1
		kind, ok := argumentTypes[strings.ToLower(strings.TrimSpace(a.Type))]
		if !ok {
			return nil, proto.Errorf(proto.CodeInvalid, "parameter %q: %q is no type that a parameter of this data source can have: use one of bool, int8, float8, numeric, text, date, timestamp, or leave it out and cast", a.Name, a.Type)
		}
		if a.Text == nil {
			continue
		}
		var err error
		switch kind {
		case 'i':
			values[i].Value, err = strconv.ParseInt(strings.TrimSpace(*a.Text), 10, 64)
		case 'f':
			values[i].Value, err = strconv.ParseFloat(strings.TrimSpace(*a.Text), 64)
		case 'b':
			var b bool
			b, err = strconv.ParseBool(strings.ToLower(strings.TrimSpace(*a.Text)))
			values[i].Value = int64(0)
			if b {
				values[i].Value = int64(1)
			}
		default:
			values[i].Value = *a.Text
		}
		if err != nil {
			return nil, proto.Errorf(proto.CodeInvalid, "parameter %q: its value is no %s", a.Name, a.Type)
		}
	}
	return values, nil
}

// mysqlCursor hands out the rows of the driver.
type mysqlCursor struct {
	rows   driver.Rows
	fields []field
	types  []string
	values []driver.Value
	// hidden are the columns with masks, by number, each with a buffer; nil: none.
	hidden  []bool
	buffers [][]byte
}

func newMySQLCursor(rows driver.Rows) (*mysqlCursor, []field) {
	names := rows.Columns()
	c := &mysqlCursor{rows: rows, fields: make([]field, len(names)), types: make([]string, len(names)), values: make([]driver.Value, len(names))}
	for i, name := range names {
		if t, ok := rows.(driver.RowsColumnTypeDatabaseTypeName); ok {
			c.types[i] = t.ColumnTypeDatabaseTypeName(i)
		}
		c.fields[i], _ = mysqlField(name, c.types[i])
	}
	return c, c.fields
}

func (c *mysqlCursor) next(cells []cell) error {
	if err := c.rows.Next(c.values); err != nil {
		return err
	}
	for i, v := range c.values {
		if c.hidden != nil && c.hidden[i] {
			var err error
			if c.buffers[i], err = maskedCell(&cells[i], &c.fields[i], c.types[i], v, c.buffers[i]); err != nil {
				return err
			}
			continue
		}
		if err := mysqlCell(&cells[i], &c.fields[i], c.types[i], v); err != nil {
			return err
		}
	}
	return nil
}

func (c *mysqlCursor) rest() error {
	for {
		if err := c.rows.Next(c.values); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}
