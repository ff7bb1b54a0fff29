package child

import (
	"database/sql/driver"
	"strings"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/mysqlguard"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/glob"
)

// hiddenFrom tells whether introspection is not to tell of a table, or of a database if
// no table is named. The server may find names whatever their case, so that does not
// count here.
func hiddenFrom(patterns []string, schema, table string) bool {
	schema, table = strings.ToLower(schema), strings.ToLower(table)
	for _, p := range patterns {
		s, object, inside := strings.Cut(strings.ToLower(p), ".")
		if glob.Match(s, schema) && (!inside || table != "" && glob.Match(object, table)) {
			return true
		}
	}
	return false
}

// judgeShow decides on a question of the catalog's, and puts our words in its place.
// schema is the database that it is about.
func (x *mysqlExecution) judgeShow(show *mysqlguard.Show) (schema string, failure *proto.Error) {
	if x.request.Guard.Mode == modeMetadata {
		switch show.Kind {
		case mysqlguard.ShowDatabases, mysqlguard.ShowTables, mysqlguard.ShowColumns, mysqlguard.ShowIndex:
		default:
			return "", denied(0, "the statement is refused: the data source tells metadata only, and this tells defaults, sizes or settings: use SHOW TABLES, SHOW COLUMNS, SHOW INDEX or DESCRIBE")
		}
	}
	if schema = show.Schema; schema == "" {
		schema = x.database
	}
	hide := x.request.Guard.Hide
	switch {
	case show.Kind == mysqlguard.ShowServer || show.Kind == mysqlguard.ShowDatabases:
	case show.Table != "" && hiddenFrom(hide, schema, show.Table):
		return "", denied(0, "the statement is refused: the data source's policy hides %s.%s, whether it is there or not", clean(schema), clean(show.Table))
	case hiddenFrom(hide, schema, ""):
		return "", denied(0, "the statement is refused: the data source's policy hides %s, whether it is there or not", clean(schema))
	}
	return schema, nil
}

// untoldInMetadata are the columns of what SHOW tells whose values may be data: the
// defaults of columns, how many values an index has, its expressions.
var untoldInMetadata = map[string]bool{"default": true, "cardinality": true, "expression": true}

// showCursor leaves out rows that the policy hides, and values that mode metadata does
// not tell.
type showCursor struct {
	*mysqlCursor
	visible func(name string) bool // nil: all
	untold  []bool                 // by column
}

// newShowCursor reads what the server answers to a Show.
func (x *mysqlExecution) newShowCursor(rows driver.Rows, show *mysqlguard.Show, schema string) (*showCursor, []field) {
	inner, fields := newMySQLCursor(rows)
	c := &showCursor{mysqlCursor: inner, untold: make([]bool, len(fields))}
	hide := x.request.Guard.Hide
	switch show.Kind {
	case mysqlguard.ShowDatabases:
		c.visible = func(name string) bool { return !hiddenFrom(hide, name, "") }
	case mysqlguard.ShowTables, mysqlguard.ShowTableStatus:
		c.visible = func(name string) bool { return !hiddenFrom(hide, schema, name) }
	}
	if x.request.Guard.Mode == modeMetadata {
		for i, f := range fields {
			c.untold[i] = untoldInMetadata[strings.ToLower(f.name)]
		}
	}
	return c, fields
}

func (c *showCursor) next(cells []cell) error {
	for {
		if err := c.mysqlCursor.next(cells); err != nil {
			return err
		}
		if c.visible == nil || len(cells) > 0 && c.visible(string(cells[0].text)) {
			break
		}
	}
	for i, untold := range c.untold {
		if untold {
			cells[i] = cell{null: true}
		}
	}
	return nil
}
