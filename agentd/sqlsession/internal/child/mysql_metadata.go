package child

import (
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"

	"github.com/go-sql-driver/mysql"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/mysqlguard"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// maxDescribedTables bounds the tables of which the columns of one statement come.
const maxDescribedTables = 1000

// describe answers on a source in mode metadata: the statement is judged as on one
// that is read-only, the server prepares it (in a read-only transaction that is
// rolled back) and says what it would return and take. Nothing is run.
//
// While it prepares, the server computes constants. It does not read a row for that,
// and what it computes is not told: of an expression nothing but the type, of an
// error nothing but its number and names that stand in the statement.
func (x *mysqlExecution) describe(ctx context.Context) (failure *proto.Error, lost bool) {
	uses, refusal := mysqlguard.Metadata(x.text.Text, x.request.Guard.Functions)
	if refusal != nil {
		return x.denial(refusal), false
	}
	if n := len(x.text.Args); n > maxDescribed || namesLength(x.text.Args) > 64*maxDescribed {
		return proto.Errorf(proto.CodeInvalid, "the statement has %d parameters: at most %d, of 64 characters, can be described", n, maxDescribed), false
	}
	failure, views, err := x.judgeNames(ctx, uses)
	if err != nil {
		return x.reduced(err), isBroken(err)
	}
	if failure != nil {
		return failure, false
	}
	if err := x.begin(ctx); err != nil {
		return x.reduced(err), isBroken(err)
	}
	prepared, err := x.prepareOnly(x.text.Text)
	if err != nil {
		broken := isBroken(err)
		x.spent = x.spent || broken
		return x.reduced(err), broken
	}
	if n := len(prepared.parameters); n != len(x.text.Args) {
		return proto.Errorf(proto.CodeInvalid, "the statement has %d parameters, and the server knows %d", len(x.text.Args), n), false
	}
	if len(prepared.columns) == 0 {
		return denied(0, "the statement is refused: the data source tells metadata only, and it returns nothing"), false
	}
	facts, failure := x.columnFacts(ctx, prepared.columns)
	if failure != nil {
		return failure, false
	}
	fields := make([]field, len(prepared.columns))
	for i, c := range prepared.columns {
		fields[i], _ = mysqlField(c.name, c.database)
		fact, known := facts[c.place()]
		fields[i].notNull = known && fact.notNull && c.notNull && !views && !uses.MayAddNulls
		if !known {
			fact.sql = strings.ToLower(c.database)
		}
		fields[i].meta = append(fields[i].meta, "mysql.sqltype", fact.sql)
	}
	for i, a := range x.text.Args {
		x.done.Parameters = append(x.done.Parameters, frame.ParameterInfo{Name: a.Name, Type: x.parameterType(prepared.parameters[i])})
	}
	if x.st.isStopped() {
		return stopError(x.st.stopReason(), x.request), false
	}
	if err := x.sink.send(frame.Begun, nil); err != nil {
		return proto.Errorf(proto.CodeInternal, "%w", err), false
	}
	f := newFeed(x.sink, x.request, x.st, fields, emptyCursor{})
	x.done.Tag = describeTag
	x.done.Rows, failure = f.end(nil)
	return failure, false
}

// emptyCursor has no rows.
type emptyCursor struct{}

func (emptyCursor) next([]cell) error { return io.EOF }
func (emptyCursor) rest() error       { return nil }

// parameterType is what the server takes a placeholder for. MariaDB does not say.
func (x *mysqlExecution) parameterType(c mysqlColumn) string {
	if x.mariadb || c.database == "NULL" {
		return ""
	}
	return strings.ToLower(c.database)
}

// place is where a column comes from.
func (c mysqlColumn) place() [3]string { return [3]string{c.schema, c.table, c.column} }

// mysqlFact is what the catalog knows of a column.
type mysqlFact struct {
	sql     string // the type as SQL writes it
	notNull bool   // it is a table's, and NOT NULL
}

// columnFacts asks the catalog for the columns that come straight from a table or view.
func (x *mysqlExecution) columnFacts(ctx context.Context, columns []mysqlColumn) (map[[3]string]mysqlFact, *proto.Error) {
	wanted, tables := map[[3]string]bool{}, map[[2]string]bool{}
	for _, c := range columns {
		if c.schema != "" && c.table != "" && c.column != "" {
			wanted[c.place()] = true
			tables[[2]string{c.schema, c.table}] = true
		}
	}
	if len(tables) > maxDescribedTables {
		return nil, proto.Errorf(proto.CodeInvalid, "the statement has columns of more than %d tables", maxDescribedTables)
	}
	facts := map[[3]string]mysqlFact{}
	for table := range tables {
		if x.st.isStopped() {
			return nil, stopError(x.st.stopReason(), x.request)
		}
		// Each is told for itself: to tell of a view the server prepares it, and no other than
		// those of the statement have been looked into.
		err := x.each(ctx, "SELECT c.COLUMN_NAME, c.COLUMN_TYPE, c.IS_NULLABLE, t.TABLE_TYPE FROM information_schema.COLUMNS c JOIN information_schema.TABLES t"+
			" ON t.TABLE_SCHEMA = c.TABLE_SCHEMA AND t.TABLE_NAME = c.TABLE_NAME WHERE c.TABLE_SCHEMA = ? AND c.TABLE_NAME = ? AND t.TABLE_SCHEMA = ? AND t.TABLE_NAME = ?",
			append(table[:], table[:]...), func(row []string) error {
				if place := [3]string{table[0], table[1], row[0]}; wanted[place] {
					facts[place] = mysqlFact{sql: clean(row[1]), notNull: row[2] == "NO" && row[3] == "BASE TABLE"}
				}
				return nil
			})
		if err != nil {
			return nil, x.reduced(err)
		}
	}
	return facts, nil
}

// mysqlOwnWords say what an error of the server's means. %s stands for a name that the
// server quotes first, which is told only where it stands in the statement.
var mysqlOwnWords = map[uint16]string{
	1044: "the account has no right to the database", 1046: "no database is selected: write DATABASE.TABLE, or set dbname in the dsn",
	1049: "there is no database%s", 1052: "the column%s is ambiguous", 1054: "there is no column%s", 1055: "a column is neither aggregated nor grouped by",
	1056: "a group can't be made of%s", 1059: "a name is too long", 1060: "the column name%s is there twice", 1064: "a syntax error", 1066: "the table or alias%s is there twice",
	1096: "no table is used", 1109: "there is no table%s", 1111: "a group function is used where it can't be", 1116: "too many tables are joined", 1117: "too many columns",
	1120: "an outer join that crosses tables", 1139: "a regular expression is garbled", 1140: "columns are mixed with aggregates without GROUP BY",
	1142: "the account has no right to the table", 1143: "the account has no right to a column", 1146: "there is no table%s",
	1166: "the column name%s is wrong", 1205: "the lock on a table could not be had in time", 1210: "a function's arguments are wrong", 1213: "the locks on tables could not be had",
	1221: "clauses are combined that can't be", 1222: "the parts of a set operation have different numbers of columns", 1235: "the server does not support a part of the statement",
	1241: "a row has another number of columns than it should", 1247: "the reference%s is not supported", 1248: "a derived table has no alias", 1267: "collations are mixed that can't be",
	1270: "collations are mixed that can't be", 1271: "collations are mixed that can't be", 1273: "there is no collation%s", 1115: "there is no character set%s", 1253: "a collation is not one of the character set",
	1295: "the server can't prepare this statement", 1305: "there is no function%s", 1345: "the account may not see into a view", 1349: "a view can't be made of a subquery",
	1352: "a view and its column list do not match", 1356: "the view refers to what there is not, or what its owner may not use", 1370: "the account has no right to a function",
	1390: "the statement has too many placeholders", 1436: "the statement is too complex", 1462: "views refer to each other", 1582: "a function call has the wrong number of arguments",
	1583: "a function's parameters are wrong", 1630: "there is no function%s", 1690: "a number is out of range",
	3105: "a generated column has an expression that can't be", 3580: "a window function is used where it can't be", 3593: "a window function is used where it can't be", 4015: "a window function is used where it can't be",
	4005: "a recursive query has no part to begin with", 4091: "there is no sequence%s",
}

var mysqlQuoted = regexp.MustCompile(`'([^']*)'`)

// reduced turns an error into one that holds no value: what it means in our own words,
// its number, and a name where that stands in the statement itself.
func (x *mysqlExecution) reduced(err error) *proto.Error {
	var refusal *mysql.MySQLError
	if !errors.As(err, &refusal) {
		if errors.Is(err, errTransport) {
			return proto.Errorf(proto.CodeInternal, "the statement can't be described: %s", err)
		}
		return x.failure(err, x.request, x.st, nil)
	}
	full := x.failure(err, x.request, x.st, x.text)
	if full.Code != proto.CodeSQL {
		if full.Code == proto.CodePolicyDenied && x.request.Guard.Mode != modeMetadata {
			return denied(0, "the statement is refused: the data source is read-only")
		}
		if full.Code == proto.CodePolicyDenied {
			return denied(0, "the statement is refused: the data source tells metadata only")
		}
		return full // stopped, timed out or killed: our own words
	}
	words, known := mysqlOwnWords[refusal.Number]
	state, position := full.SQL.GetSqlstate(), int(full.SQL.GetPosition())
	switch {
	case known:
		if strings.Contains(words, "%s") {
			words = fmt.Sprintf(words, x.ownName(refusal.Message))
		}
		words = fmt.Sprintf("%s (error %d, SQLSTATE %s", words, refusal.Number, state)
	case len(x.request.Guard.Functions) > 0:
		// A function that the policy lists could raise any number and any state.
		state, position = "HY000", 0
		words = "the reason is not told, as it may hold data (SQLSTATE HY000"
	default:
		words = fmt.Sprintf("the reason is not told, as it may hold data (error %d, SQLSTATE %s", refusal.Number, state)
	}
	if position > 0 {
		words += fmt.Sprintf(", position %d", position)
	}
	return &proto.Error{
		Code: proto.CodeSQL, Message: "the database refused the statement: " + words + ")",
		SQL: &posternv1.SQLErrorDetail{Sqlstate: state, Position: int32(position)},
	}
}

// ownName is the name that a message quotes first, as far as it stands in the
// statement, with a space in front.
func (x *mysqlExecution) ownName(message string) string {
	match := mysqlQuoted.FindStringSubmatch(message)
	if match == nil {
		return ""
	}
	known := map[string]bool{}
	for t := range sqltext.MySQL.Pieces(x.text.Text) {
		if t.Kind == sqltext.KindWord || t.Kind == sqltext.KindIdentifier {
			known[strings.ToLower(t.Text)] = true
		}
	}
	parts := strings.Split(match[1], ".")
	// The server puts the database in front, which the statement may leave out.
	for len(parts) > 0 && !known[strings.ToLower(parts[0])] {
		parts = parts[1:]
	}
	if len(parts) == 0 || slices.ContainsFunc(parts, func(p string) bool { return !known[strings.ToLower(p)] }) {
		return ""
	}
	return " " + clean(strings.Join(parts, "."))
}
