package child

import (
	"bytes"
	"context"
	"database/sql/driver"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/mysqlguard"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
)

// What masks by column rest on with MySQL and MariaDB:
//
//   - a statement can only read a table whose name stands in it, or in the definition of a
//     view whose name does, and a column only where its name stands or a star does. Names
//     are compared as the server does, so what is not ASCII counts for any name;
//   - where the server says that a column of the result comes from is a lie where there is a
//     derived table, a CTE or a view: MySQL 9.7 calls the s of (SELECT ssn AS name FROM people) s
//     people.name, MariaDB 10.11 calls it s.name as if s were a table. It is the truth in a
//     statement with a single SELECT and no views (TestMariaMaskCorpus), so it counts there
//     alone;
//   - generated columns may be made of masked ones, statistics and histories of statements hold
//     values: they are masked as a whole.

// mysqlLineage is what is known of a statement's result.
type mysqlLineage struct {
	rules touched // of the columns that it may read
	// certain tells that the origins that the server tells are to be relied on.
	certain bool
	// columns are those of the tables whose names stand in the statement, by schema, table
	// and column as the catalog has them.
	columns map[[3]string]mysqlMaskable
}

// mysqlMaskable is a column of a table: its rule or -1, and whether it is made of others.
type mysqlMaskable struct {
	rule      int
	generated bool
}

// tellingSchemas and tellingTables hold values of other tables, or texts of statements.
var (
	tellingSchemas = map[string]bool{"mysql": true, "performance_schema": true, "sys": true}
	tellingTables  = words("processlist column_statistics column_stats table_stats index_stats general_log slow_log optimizer_trace profiling json_table")
)

func isTelling(name string) bool {
	return tellingSchemas[name] || tellingTables[name] || strings.HasPrefix(name, "innodb_")
}

// selectOptions are words between SELECT and the list.
var selectOptions = words("select all distinct distinctrow high_priority straight_join sql_small_result sql_big_result sql_buffer_result sql_cache sql_no_cache sql_calc_found_rows")

// shape is what tokens tell of a text: how many SELECTs it has, whether it has rows
// from elsewhere (WITH, VALUES, set operations, ...), and whether a star stands for columns.
type shape struct {
	selects int
	others  bool
	star    bool
}

var otherRows = words("with values value table union except intersect minus json_table lateral xmltable")

func shapeOf(text string) shape {
	var s shape
	var before [2]sqltext.Piece // the last two tokens
	for t := range sqltext.MySQL.Pieces(text) {
		if t.Kind == sqltext.KindComment {
			continue
		}
		word := strings.ToLower(t.Text)
		switch {
		case t.Kind == sqltext.KindWord && word == "select":
			s.selects++
		case t.Kind == sqltext.KindWord && otherRows[word]:
			s.others = true
			s.star = s.star || word == "table" // all its columns
		case t.Kind == sqltext.KindSymbol && t.Text == "*":
			last := before[1]
			counts := last.Kind == sqltext.KindSymbol && last.Text == "(" && before[0].Kind == sqltext.KindWord && strings.EqualFold(before[0].Text, "count")
			times := last.Kind == sqltext.KindNumber || last.Kind == sqltext.KindLiteral || last.Kind == sqltext.KindIdentifier || last.Kind == sqltext.KindValue ||
				last.Kind == sqltext.KindSymbol && last.Text == ")" || last.Kind == sqltext.KindWord && !selectOptions[strings.ToLower(last.Text)]
			s.star = s.star || !counts && !times
		}
		before = [2]sqltext.Piece{before[1], t}
	}
	return s
}

// follow finds out which masked columns a statement of these names may read. nil: none.
// views tells whether any name may be a view's.
func (x *mysqlExecution) follow(ctx context.Context, names []string, views bool) (*mysqlLineage, error) {
	m := x.masking
	if !m.hidesColumns() || x.show != nil {
		return nil, nil
	}
	l := &mysqlLineage{rules: touched{}, columns: map[[3]string]mysqlMaskable{}}
	s := shapeOf(x.text.Text)
	l.certain = s.selects == 1 && !s.others && !views
	star := s.star || views
	known, odd := map[string]bool{}, false
	for _, n := range names {
		odd = odd || !isASCII(n)
	}
	lowered, err := x.lower(ctx, names)
	if err != nil {
		return nil, err
	}
	listed := false
	for _, n := range lowered {
		known[n] = true
		star = star || n == "_rowid" // a key by another name
		listed = listed || slices.ContainsFunc(x.request.Guard.Functions, func(pattern string) bool {
			return mysqlguard.Allowed([]string{pattern[strings.LastIndexByte(pattern, '.')+1:]}, "", n)
		})
		if isTelling(n) {
			listed = true
		}
	}
	// What a listed function or view reads is not looked at; nor is what a name beyond
	// ASCII may mean, which the server compares by rules of its own.
	if listed || odd || isTelling(strings.ToLower(x.database)) {
		l.rules = m.allRules()
	}
	objects, err := x.objectsNow(ctx)
	if err != nil {
		return nil, err
	}
	for n := range known {
		for _, table := range objects.tables[n] {
			if m.policy.Covers(table[0], table[1], "") < 0 {
				continue
			}
			if err := x.columnsOf(ctx, l, table, known, star); err != nil {
				return nil, err
			}
		}
	}
	if len(l.rules) == 0 {
		return nil, nil
	}
	return l, nil
}

// columnsOf notes the columns of a table or view, and which of the masked ones the
// statement may read.
func (x *mysqlExecution) columnsOf(ctx context.Context, l *mysqlLineage, table [2]string, known map[string]bool, star bool) error {
	rules, generated := touched{}, false
	err := x.each(ctx, "SELECT COLUMN_NAME, LOWER(COLUMN_NAME), GENERATION_EXPRESSION IS NOT NULL AND GENERATION_EXPRESSION <> '' FROM information_schema.COLUMNS WHERE TABLE_SCHEMA = ? AND TABLE_NAME = ?", table[:], func(row []string) error {
		c := mysqlMaskable{rule: x.masking.policy.Covers(table[0], table[1], row[0]), generated: row[2] == "1"}
		l.columns[[3]string{table[0], table[1], row[0]}] = c
		if c.rule >= 0 {
			rules[c.rule] = true
			if star || known[row[1]] || !isASCII(row[1]) {
				l.rules[c.rule] = true
			}
		}
		generated = generated || c.generated && (star || known[row[1]] || !isASCII(row[1]))
		return nil
	})
	if generated {
		for rule := range rules {
			l.rules[rule] = true
		}
	}
	if len(rules) == 0 { // none of its columns is masked
		for place, c := range l.columns {
			if place[0] == table[0] && place[1] == table[1] {
				c.generated = false
				l.columns[place] = c
			}
		}
	}
	return err
}

// hide masks the fields of a result. said is what the server says of its columns.
func (x *mysqlExecution) hide(ctx context.Context, l *mysqlLineage, said []mysqlColumn, c *mysqlCursor) *proto.Error {
	if len(said) != len(c.fields) {
		return disagree()
	}
	objects, err := x.objectsNow(ctx)
	if err != nil {
		return x.failure(err, x.request, x.st, nil)
	}
	c.hidden, c.buffers = make([]bool, len(c.fields)), make([][]byte, len(c.fields))
	for i := range c.fields {
		rule, source := x.masking.whole(l.rules), "(expression)"
		s := said[i]
		if l.certain && s.schema != "" && s.table != "" && s.column != "" && !isTelling(strings.ToLower(s.schema)) && !isTelling(strings.ToLower(s.table)) {
			column, known := l.columns[s.place()]
			switch {
			case known && column.rule >= 0:
				rule, source = ruleOf(x.masking.masks[column.rule]), s.schema+"."+s.table+"."+s.column
			case known && column.generated:
			case known, objects.isTable(s.schema, s.table) && x.masking.policy.Covers(s.schema, s.table, "") < 0:
				continue
			}
		}
		x.masking.hideField(&c.fields[i], rule, source)
		c.hidden[i] = true
	}
	return nil
}

// isTable tells whether there is a table of exactly that name which is no view.
func (o *mysqlObjects) isTable(schema, table string) bool {
	name := strings.ToLower(table)
	return slices.Contains(o.tables[name], [2]string{schema, table}) && !slices.Contains(o.views[name], [2]string{schema, table})
}

// maskedCell is the text of a value for its mask, as PostgreSQL would write it.
func maskedCell(out *cell, f *field, database string, v driver.Value, buffer []byte) ([]byte, error) {
	*out = cell{}
	if v == nil || f.mask.AlwaysNull() {
		out.null = true
		return buffer, nil
	}
	if !f.isText() {
		return buffer, mysqlCell(out, f, database, v)
	}
	b := buffer[:0]
	switch v := v.(type) {
	case int64:
		b = strconv.AppendInt(b, v, 10)
	case uint64:
		b = strconv.AppendUint(b, v, 10)
	case float32:
		b = appendFloat(b, float64(v), 32)
	case float64:
		b = appendFloat(b, v, 64)
	case string:
		b = append(b, v...)
	case []byte:
		switch t := mysqlTypes[database]; {
		case database == "BIT":
			var n uint64
			for _, c := range v {
				n = n<<8 | uint64(c)
			}
			b = strconv.AppendUint(b, n, 10)
		case t.layout == layoutTimestamp:
			if bytes.IndexByte(v, '.') >= 0 {
				v = bytes.TrimRight(bytes.TrimRight(v, "0"), ".")
			}
			if b = append(b, v...); t.pg == "timestamptz" {
				b = append(b, "+00"...)
			}
		case t.pg == "": // bytes
			b = hex.AppendEncode(append(b, `\x`...), v)
		default:
			b = appendValid(b, v)
		}
	default:
		return b, &valueError{f.name, fmt.Sprintf("the driver gave a %T", v)}
	}
	out.text = b
	return b, nil
}
