package rowfmt

import (
	"strconv"
	"unicode"
	"unicode/utf8"

	"golang.org/x/text/width"
)

const (
	// sizingRows and sizingBytes bound what is held back to size the columns.
	sizingRows  = 1000
	sizingBytes = 1 << 20
	// maxPadding is the widest a column is padded to, in characters: one long
	// value must not blow up every row.
	maxPadding = 1000
)

// tableEncoder writes psql's aligned form.
type tableEncoder struct {
	*out
	columns []column
	null    []byte
	right   []bool
	widths  []int
	rows    int64
	// excerpt is the gap in the rows, which comes when After are printed.
	excerpt Excerpt
	printed int64

	// held are the cells of the first rows, one after the other; ends and cells
	// say where each ends and how wide it is.
	held   []byte
	ends   []int
	cells  []int
	sized  bool
	buffer []byte
}

func newTable(o *out, columns []column, null string) *tableEncoder {
	e := &tableEncoder{out: o, columns: columns, right: make([]bool, len(columns)), widths: make([]int, len(columns))}
	e.null, _ = appendSafe(nil, []byte(null))
	for i := range columns {
		e.right[i] = rightAligned(&columns[i])
		_, e.widths[i] = appendSafe(nil, []byte(columns[i].name))
	}
	return e
}

// rightAligned follows psql's column_type_alignment.
func rightAligned(c *column) bool {
	switch c.kind {
	case kindInt8, kindInt16, kindInt32, kindInt64, kindUint8, kindUint16, kindUint32, kindUint64, kindFloat32, kindFloat64:
		return true
	case kindUTF8:
		switch c.pgType {
		case "numeric", "money", "oid", "xid", "xid8", "cid":
			return true
		}
	}
	return false
}

func (e *tableEncoder) begin() error { return nil }

func (e *tableEncoder) batch(rows int) error {
	for row := range rows {
		e.rows++
		if !e.sized {
			for i := range e.columns {
				var cell int
				e.held, cell = e.cell(e.held, i, row)
				e.ends = append(e.ends, len(e.held))
				e.cells = append(e.cells, cell)
				e.widths[i] = max(e.widths[i], cell)
			}
			if e.rows >= sizingRows || len(e.held) >= sizingBytes {
				e.release()
			}
			continue
		}
		e.gap()
		for i := range e.columns {
			var cell int
			e.buffer, cell = e.cell(e.buffer[:0], i, row)
			e.put(i, e.buffer, cell)
		}
		if cap(e.buffer) > sizingBytes {
			e.buffer = nil
		}
		e.buf = append(e.buf, '\n')
		if e.full() {
			if err := e.flush(); err != nil {
				return err
			}
		}
	}
	if e.sized {
		return e.flush()
	}
	return nil
}

// release prints the header and the rows held back.
func (e *tableEncoder) release() {
	if e.sized {
		return
	}
	e.sized = true
	for i := range e.widths {
		e.widths[i] = min(e.widths[i], maxPadding)
	}
	if len(e.columns) == 0 {
		e.buf = append(e.buf, "--\n"...)
		return
	}
	e.header()
	start := 0
	for i := range e.cells {
		column := i % len(e.columns)
		if column == 0 {
			e.gap()
		}
		e.put(column, e.held[start:e.ends[i]], e.cells[i])
		start = e.ends[i]
		if column == len(e.columns)-1 {
			e.buf = append(e.buf, '\n')
			if e.full() {
				_ = e.flush() // the error sticks
			}
		}
	}
	e.held, e.ends, e.cells = nil, nil, nil
}

// gap stands before each row, and after the last one: where rows are missing it
// says how many.
func (e *tableEncoder) gap() {
	if e.excerpt.Missing > 0 && e.printed == e.excerpt.After {
		e.buf = append(e.buf, " ... "...)
		e.buf = strconv.AppendInt(e.buf, e.excerpt.Missing, 10)
		e.buf = append(e.buf, " rows ...\n"...)
	}
	e.printed++
}

func (e *tableEncoder) header() {
	for i := range e.columns {
		if i > 0 {
			e.buf = append(e.buf, " |"...)
		}
		e.buf = append(e.buf, ' ')
		name, cell := appendSafe(nil, []byte(e.columns[i].name))
		spare := max(0, e.widths[i]-cell)
		e.pad(spare / 2)
		e.buf = append(e.buf, name...)
		if i < len(e.columns)-1 {
			e.pad(spare - spare/2)
		}
	}
	e.buf = append(e.buf, '\n')
	for i, w := range e.widths {
		if i > 0 {
			e.buf = append(e.buf, '+')
		}
		for range w + 2 {
			e.buf = append(e.buf, '-')
		}
	}
	e.buf = append(e.buf, '\n')
}

// put appends one cell of a row.
func (e *tableEncoder) put(i int, text []byte, cell int) {
	if i > 0 {
		e.buf = append(e.buf, " |"...)
	}
	e.buf = append(e.buf, ' ')
	spare := max(0, e.widths[i]-cell)
	if e.right[i] {
		e.pad(spare)
	}
	e.buf = append(e.buf, text...)
	if !e.right[i] && i < len(e.columns)-1 {
		e.pad(spare)
	}
}

func (e *tableEncoder) pad(n int) {
	for range n {
		e.buf = append(e.buf, ' ')
	}
}

func (e *tableEncoder) end() error {
	if len(e.columns) == 0 && e.rows == 0 {
		return nil // a command, not a result
	}
	e.release()
	e.gap()
	e.buf = append(e.buf, '(')
	e.buf = strconv.AppendInt(e.buf, e.rows, 10)
	if e.excerpt.Missing > 0 {
		e.buf = append(e.buf, " of "...)
		e.buf = strconv.AppendInt(e.buf, e.rows+e.excerpt.Missing, 10)
	}
	if e.rows == 1 && e.excerpt.Missing == 0 {
		e.buf = append(e.buf, " row)\n"...)
	} else {
		e.buf = append(e.buf, " rows)\n"...)
	}
	return nil
}

func (e *tableEncoder) abort() {
	if len(e.columns) > 0 && e.rows > 0 {
		e.release()
	}
}

// cell appends a value in its safe form and returns its width on a terminal.
func (e *tableEncoder) cell(b []byte, i, row int) ([]byte, int) {
	c := &e.columns[i]
	if c.null(row) {
		_, w := appendSafe(nil, e.null)
		return append(b, e.null...), w
	}
	start := len(b)
	switch c.kind {
	case kindUTF8:
		return appendSafe(b, c.bytes(row))
	case kindBinary:
		b = appendHex(append(b, '\\', 'x'), c.bytes(row))
	case kindBool:
		if c.bool(row) {
			b = append(b, 't')
		} else {
			b = append(b, 'f')
		}
	default:
		b = appendPlain(b, c, row)
	}
	return b, len(b) - start
}

// appendSafe appends v so that it cannot drive a terminal or leave its line:
// control characters, line breaks and marks that turn the writing direction
// become escapes, invalid UTF-8 becomes U+FFFD. It returns the width too.
func appendSafe(b, v []byte) ([]byte, int) {
	plain := 0
	for plain < len(v) && v[plain] >= ' ' && v[plain] < 0x7f {
		plain++
	}
	b = append(b, v[:plain]...)
	cells := plain
	for i := plain; i < len(v); {
		if c := v[i]; c >= ' ' && c < 0x7f {
			b = append(b, c)
			cells++
			i++
			continue
		}
		r, n := utf8.DecodeRune(v[i:])
		i += n
		start := len(b)
		switch {
		case r == '\n':
			b = append(b, `\n`...)
		case r == '\r':
			b = append(b, `\r`...)
		case r == '\t':
			b = append(b, `\t`...)
		case r < 0x100 && unicode.IsControl(r):
			b = append(b, '\\', 'x', hexDigits[r>>4], hexDigits[r&15])
		case unsafeRune(r):
			b = append(b, '\\', 'u', hexDigits[r>>12&15], hexDigits[r>>8&15], hexDigits[r>>4&15], hexDigits[r&15])
		default:
			b = utf8.AppendRune(b, r)
			cells += runeWidth(r)
			continue
		}
		cells += len(b) - start
	}
	return b, cells
}

// unsafeRune says whether r changes how what follows is shown: marks of
// direction and line ends of Unicode.
func unsafeRune(r rune) bool {
	return r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069 || r == 0x200e || r == 0x200f || r == 0x061c || r == 0x2028 || r == 0x2029
}

// runeWidth is the number of cells that r takes on a terminal.
func runeWidth(r rune) int {
	if unicode.In(r, unicode.Mn, unicode.Me, unicode.Cf) {
		return 0
	}
	switch width.LookupRune(r).Kind() {
	case width.EastAsianWide, width.EastAsianFullwidth:
		return 2
	}
	return 1
}

// Safe returns s in the form that a table shows it in, fit for a terminal and on
// one line, and the number of cells that it takes there.
func Safe(s string) (string, int) {
	b, cells := appendSafe(nil, []byte(s))
	return string(b), cells
}
