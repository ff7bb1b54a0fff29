package child

import (
	"encoding/hex"
	"strconv"
	"strings"

	"modernc.org/libc"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/mask"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
)

// What masks by column rest on with SQLite:
//
//   - the authorizer names every column that a statement reads, through views, CTEs,
//     subqueries and triggers, while it is compiled; what a virtual table reads comes while
//     it runs, and is refused then;
//   - sqlite3_column_origin_name tells the column of a table that a column of the result is.
//     It looks into one part of a set operation alone, so it counts for nothing where the
//     statement, or a view in it, may have one;
//   - the authorizer does not name what FULL JOIN ... USING puts together of two columns, nor
//     its tables: where the word FULL is, everything is masked;
//   - generated columns, virtual tables with their own tables, and statistics hold values
//     of other columns: they are masked as a whole.

// sqliteReadings is what the authorizer told of a statement.
type sqliteReadings struct {
	masking *masking
	columns map[[2]string]bool // table and column, as the schema has them
	rules   touched
	kinds   map[string]string // of tables, by name in lower case: see look
	running bool              // it is compiled
}

// read notes a column that is read; the reason is why that is refused.
func (r *sqliteReadings) read(table, column string) (reason string) {
	if r == nil {
		return ""
	}
	key := [2]string{table, column}
	rule := -1
	if column != "" {
		rule = r.masking.policy.Covers(sqliteSchema, table, column)
	}
	if rule >= 0 && r.running && !r.columns[key] {
		return "a virtual table reads the masked column " + clean(table) + "." + clean(column)
	}
	r.columns[key] = true
	if rule >= 0 {
		r.rules[rule] = true
	}
	return ""
}

// sqliteLineage is what is known of a statement's result.
type sqliteLineage struct {
	rules touched
	// certain tells that the origins that SQLite tells are to be relied on.
	certain bool
	// generated are columns that are made of others, by table and column in lower case.
	generated map[[2]string]bool
}

// follow looks at what the statement reads. nil: no masked column, and nothing that
// could hold one's values.
func (x *sqliteExecution) follow() (*sqliteLineage, error) {
	r := x.guard.readings
	if r == nil {
		return nil, nil
	}
	l := &sqliteLineage{rules: touched{}, certain: true, generated: map[[2]string]bool{}}
	for rule := range r.rules {
		l.rules[rule] = true
	}
	tables := map[string]bool{}
	for c := range r.columns {
		tables[c[0]] = true
	}
	for table := range tables {
		kind, err := x.kindOf(table)
		if err != nil {
			return nil, err
		}
		switch {
		case kind == "virtual" || kind == "shadow" || isStatistics(table):
			l.rules = x.masking.allRules()
		case kind == "view":
			if x.masking.policy.Covers(sqliteSchema, table, "") < 0 {
				break
			}
			for c := range r.columns {
				if c[0] == table && x.masking.policy.Covers(sqliteSchema, table, c[1]) >= 0 {
					l.certain = false // what its columns are made of has other names
				}
			}
		case kind == "table":
			if err := x.generatedIn(l, table, r); err != nil {
				return nil, err
			}
		}
	}
	words, err := x.allWords()
	if err != nil {
		return nil, err
	}
	if words["full"] {
		l.rules = x.masking.allRules()
	}
	if len(l.rules) == 0 {
		return nil, nil
	}
	l.certain = l.certain && !words["union"] && !words["except"] && !words["intersect"] && !words["values"] && !words["full"]
	return l, nil
}

// isStatistics tells of the tables in which ANALYZE keeps samples of values.
func isStatistics(table string) bool { return strings.HasPrefix(strings.ToLower(table), "sqlite_stat") }

// kindOf is table, view, virtual or shadow; empty for a table-valued function.
func (x *sqliteExecution) kindOf(table string) (string, error) {
	r, name := x.guard.readings, strings.ToLower(table)
	if kind, known := r.kinds[name]; known {
		return kind, nil
	}
	rows, err := x.db.exec("SELECT type FROM pragma_table_list(?1) WHERE schema IN ('main', 'temp')", table)
	if err != nil {
		return "", err
	}
	kind := ""
	for _, row := range rows {
		// One of that name in temp hides the other: neither is relied on.
		if kind != "" && kind != row[0] {
			row[0] = "virtual"
		}
		kind = row[0]
	}
	r.kinds[name] = kind
	return kind, nil
}

// generatedIn finds the generated columns of a table with masked columns, each of which
// may be made of one.
func (x *sqliteExecution) generatedIn(l *sqliteLineage, table string, r *sqliteReadings) error {
	if x.masking.policy.Covers(sqliteSchema, table, "") < 0 {
		return nil
	}
	rows, err := x.db.exec("SELECT name, hidden FROM pragma_table_xinfo(?1)", table)
	if err != nil {
		return err
	}
	rules := touched{}
	for _, row := range rows {
		if rule := x.masking.policy.Covers(sqliteSchema, table, row[0]); rule >= 0 {
			rules[rule] = true
		}
	}
	for _, row := range rows {
		if row[1] != "2" && row[1] != "3" || len(rules) == 0 {
			continue
		}
		l.generated[[2]string{strings.ToLower(table), strings.ToLower(row[0])}] = true
		if r.columns[[2]string{table, row[0]}] {
			for rule := range rules {
				l.rules[rule] = true
			}
		}
	}
	return nil
}

// allWords are the words without quotes, in lower case, of the statement and of all views
// whose names stand in it or in such a view.
func (x *sqliteExecution) allWords() (map[string]bool, error) {
	views := map[string][]string{}
	for _, schema := range []string{"sqlite_schema", "sqlite_temp_schema"} {
		rows, err := x.db.exec("SELECT name, sql FROM " + schema + " WHERE type = 'view'")
		if err != nil {
			return nil, err
		}
		for _, row := range rows {
			name := strings.ToLower(row[0])
			views[name] = append(views[name], row[1])
		}
	}
	found := map[string]bool{}
	for texts := []string{x.text.Text}; len(texts) > 0; {
		text := texts[0]
		texts = texts[1:]
		for t := range sqltext.SQLite.Pieces(text) {
			name := strings.ToLower(t.Text)
			switch t.Kind {
			case sqltext.KindWord:
				found[name] = true
			case sqltext.KindIdentifier:
			case sqltext.KindLiteral: // SQLite takes one for a name where it must be one
				name = strings.ReplaceAll(strings.Trim(name, "'"), "''", "'")
			default:
				continue
			}
			texts = append(texts, views[name]...)
			delete(views, name)
		}
	}
	return found, nil
}

// origin is the column of a table that a column of the result is; empty for others.
func (s *sqliteStatement) origin(i int) (schema, table, column string) {
	return libc.GoString(sqlite3.Xsqlite3_column_database_name(s.tls, s.stmt, int32(i))), libc.GoString(sqlite3.Xsqlite3_column_table_name(s.tls, s.stmt, int32(i))),
		libc.GoString(sqlite3.Xsqlite3_column_origin_name(s.tls, s.stmt, int32(i)))
}

// hide masks the columns of a result.
func (x *sqliteExecution) hide(c *sqliteCursor) *proto.Error {
	l, err := x.follow()
	if err != nil {
		return x.failure(err)
	}
	if l == nil {
		return nil
	}
	for i := range c.fields {
		schema, table, column := c.s.origin(i)
		rule, source := x.masking.whole(l.rules), "(expression)"
		if l.certain && column != "" && (schema == sqliteSchema || schema == "temp") && !isStatistics(table) && !l.generated[[2]string{strings.ToLower(table), strings.ToLower(column)}] {
			kind, err := x.kindOf(table)
			if err != nil {
				return x.failure(err)
			}
			if kind == "table" {
				own := x.masking.policy.Covers(sqliteSchema, table, column)
				if own < 0 {
					continue
				}
				rule, source = ruleOf(x.masking.masks[own]), sqliteSchema+"."+table+"."+column
			}
		}
		c.hide(i, x.masking, rule, source)
	}
	return nil
}

// writesMasked refuses a statement that writes and reads masked columns: where the
// values would go they may not be masked.
func (x *sqliteExecution) writesMasked(s *sqliteStatement) *proto.Error {
	if s.readOnly() {
		return nil
	}
	l, err := x.follow()
	switch {
	case err != nil:
		return x.failure(err)
	case l != nil:
		return denied(0, "the statement is refused: it writes, and reads masked columns, which may not be masked where it puts them")
	}
	return nil
}

// hide masks column i.
func (c *sqliteCursor) hide(i int, m *masking, rule mask.Rule, source string) {
	f, column := &c.fields[i], &c.columns[i]
	// What a table's column declares is the schema's; an expression's type is its value's.
	declared, isColumn := c.s.declared(i)
	switch t := strings.ToUpper(declared); {
	case !isColumn || declared == "":
		*column = sqliteColumn{want: sqlite3.SQLITE_TEXT, any: true}
		f.meta[1], f.layout, f.arrow = "text", layoutText, utf8Type.arrow
	case column.any && (strings.Contains(t, "DATE") || strings.Contains(t, "TIME")):
		f.meta[1] = "timestamp"
	case column.any && strings.Contains(t, "BOOL"):
		f.meta[1] = "bool"
	case column.any:
		f.meta[1] = "numeric"
	}
	m.hideField(f, rule, source)
	if f.meta[1] == "timestamp" || f.meta[1] == "bool" {
		f.meta[1] = "text" // that is what SQLite keeps them as
	}
	column.masked, column.null = f.isText(), f.mask.AlwaysNull()
}

// masked writes any value as text for its mask.
func (c *sqliteCursor) masked(i int, kind int32, out *cell) {
	b := c.buffers[i][:0]
	switch kind {
	case sqlite3.SQLITE_INTEGER:
		b = strconv.AppendInt(b, c.s.integer(i), 10)
	case sqlite3.SQLITE_FLOAT:
		b = appendFloat(b, c.s.real(i), 64)
	case sqlite3.SQLITE_TEXT:
		b = appendValid(b, c.s.bytes(i))
	default:
		b = hex.AppendEncode(append(b, `\x`...), c.s.bytes(i))
	}
	c.buffers[i], out.text = b, b
}

// newReadings is nil where no column is masked, and in mode metadata, which tells no
// values.
func newReadings(m *masking, g *frame.Guard) *sqliteReadings {
	if !m.hidesColumns() || g.Mode == modeMetadata {
		return nil
	}
	return &sqliteReadings{masking: m, columns: map[[2]string]bool{}, rules: touched{}, kinds: map[string]string{}}
}
