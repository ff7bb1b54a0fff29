package child

import (
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/apache/arrow-go/v18/arrow"
	sqlite3 "modernc.org/sqlite/lib"
)

// sqliteColumn is what the values of a column become. SQLite gives each value a type of
// its own; a value that is not of the column's is an error, never another value.
type sqliteColumn struct {
	want int32 // SQLITE_INTEGER, SQLITE_FLOAT, SQLITE_TEXT, SQLITE_BLOB
	any  bool  // numbers become text
	// masked: any value becomes text, for its mask; null: no value is looked at.
	masked, null bool
}

// sqliteCursor hands out the rows of a statement. The first is read before the columns
// are described: an expression has no type but that of its value.
type sqliteCursor struct {
	s       *sqliteStatement
	fields  []field
	columns []sqliteColumn
	waiting bool // a row that was read and not handed out
	ended   bool
	rows    uint64
	buffers [][]byte
}

// first runs the statement to its first row and describes the columns.
func (c *sqliteCursor) first() error {
	more, err := c.s.step()
	if err != nil {
		return err
	}
	c.waiting, c.ended = more, !more
	c.describe()
	return nil
}

// affinity is what a declared type makes of a column (datatype3.html, 3.1).
func affinity(declared string) (want int32, any bool) {
	t := strings.ToUpper(declared)
	switch {
	case strings.Contains(t, "INT"):
		return sqlite3.SQLITE_INTEGER, false
	case strings.Contains(t, "CHAR"), strings.Contains(t, "CLOB"), strings.Contains(t, "TEXT"):
		return sqlite3.SQLITE_TEXT, false
	case strings.Contains(t, "BLOB"):
		return sqlite3.SQLITE_BLOB, false
	case strings.Contains(t, "REAL"), strings.Contains(t, "FLOA"), strings.Contains(t, "DOUB"):
		return sqlite3.SQLITE_FLOAT, false
	}
	// NUMERIC: DECIMAL, BOOLEAN, DATE and whatever anybody thinks of.
	return sqlite3.SQLITE_TEXT, true
}

// describe says what the columns are.
func (c *sqliteCursor) describe() {
	n := c.s.columns()
	c.fields, c.columns, c.buffers = make([]field, n), make([]sqliteColumn, n), make([][]byte, n)
	for i := range n {
		declared, _ := c.s.declared(i)
		column := &c.columns[i]
		switch {
		case declared != "":
			column.want, column.any = affinity(declared)
		case c.waiting:
			if column.want = c.s.kind(i); column.want == sqlite3.SQLITE_NULL {
				column.want, column.any = sqlite3.SQLITE_TEXT, true
			}
		default:
			column.want, column.any = sqlite3.SQLITE_TEXT, true
		}
		f := &c.fields[i]
		f.name = strings.ToValidUTF8(c.s.columnName(i), "\uFFFD")
		pg := "text"
		f.layout, f.arrow = layoutText, arrow.BinaryTypes.String
		switch column.want {
		case sqlite3.SQLITE_INTEGER:
			pg, f.layout, f.arrow = "int8", layout64, arrow.PrimitiveTypes.Int64
		case sqlite3.SQLITE_FLOAT:
			pg, f.layout, f.arrow = "float8", layout64, arrow.PrimitiveTypes.Float64
		case sqlite3.SQLITE_BLOB:
			pg, f.arrow = "bytea", arrow.BinaryTypes.Binary
		}
		f.meta = []string{"pg.type", pg, "sqlite.type", declared}
	}
}

var sqliteKinds = map[int32]string{
	sqlite3.SQLITE_INTEGER: "an integer", sqlite3.SQLITE_FLOAT: "a real", sqlite3.SQLITE_TEXT: "a text", sqlite3.SQLITE_BLOB: "a blob",
}

func (c *sqliteCursor) next(cells []cell) error {
	switch {
	case c.ended:
		return io.EOF
	case c.waiting:
		c.waiting = false
	default:
		more, err := c.s.step()
		if err != nil {
			return err
		}
		if !more {
			c.ended = true
			return io.EOF
		}
	}
	c.rows++
	for i := range cells {
		if err := c.value(i, &cells[i]); err != nil {
			return err
		}
	}
	return nil
}

func (c *sqliteCursor) value(i int, out *cell) error {
	*out = cell{}
	kind, column := c.s.kind(i), c.columns[i]
	mismatch := func(cast string) error {
		return &valueError{c.fields[i].name, fmt.Sprintf("row %d holds %s, and the column is of %ss: use CAST(... AS %s)", c.rows, sqliteKinds[kind], strings.TrimPrefix(strings.TrimPrefix(sqliteKinds[column.want], "a "), "an "), cast)}
	}
	if kind == sqlite3.SQLITE_NULL {
		out.null = true
		return nil
	}
	if column.null {
		out.null = true
		return nil
	}
	if column.masked {
		c.masked(i, kind, out)
		return nil
	}
	switch column.want {
	case sqlite3.SQLITE_INTEGER:
		if kind != sqlite3.SQLITE_INTEGER {
			return mismatch("TEXT")
		}
		out.bits = c.s.integer(i)
	case sqlite3.SQLITE_FLOAT:
		switch {
		case kind == sqlite3.SQLITE_FLOAT:
			out.bits = int64(math.Float64bits(c.s.real(i)))
		case kind == sqlite3.SQLITE_INTEGER && int64(float64(c.s.integer(i))) == c.s.integer(i) && c.s.integer(i) != math.MaxInt64:
			out.bits = int64(math.Float64bits(float64(c.s.integer(i))))
		default:
			return mismatch("TEXT")
		}
	case sqlite3.SQLITE_BLOB:
		if kind != sqlite3.SQLITE_BLOB && kind != sqlite3.SQLITE_TEXT {
			return mismatch("BLOB")
		}
		out.text = c.s.bytes(i)
	default:
		switch {
		case kind == sqlite3.SQLITE_TEXT:
			out.text = c.s.bytes(i)
			if !utf8.Valid(out.text) {
				return &valueError{c.fields[i].name, fmt.Sprintf("row %d holds a text that is not valid UTF-8: use CAST(... AS BLOB)", c.rows)}
			}
		case kind == sqlite3.SQLITE_INTEGER && column.any:
			c.buffers[i] = strconv.AppendInt(c.buffers[i][:0], c.s.integer(i), 10)
			out.text = c.buffers[i]
		case kind == sqlite3.SQLITE_FLOAT && column.any:
			c.buffers[i] = appendReal(c.buffers[i][:0], c.s.real(i))
			out.text = c.buffers[i]
		case kind == sqlite3.SQLITE_BLOB:
			return mismatch("BLOB")
		default:
			return mismatch("TEXT")
		}
	}
	return nil
}

// appendReal writes a real so that it reads back the same, and as a real.
func appendReal(out []byte, v float64) []byte {
	switch {
	case math.IsInf(v, 1):
		return append(out, "Infinity"...)
	case math.IsInf(v, -1):
		return append(out, "-Infinity"...)
	}
	at := len(out)
	out = strconv.AppendFloat(out, v, 'g', -1, 64)
	if !strings.ContainsAny(string(out[at:]), ".e") {
		out = append(out, ".0"...)
	}
	return out
}

func (c *sqliteCursor) rest() error {
	// There is nobody who would wait for us to read on.
	c.ended = true
	return nil
}
