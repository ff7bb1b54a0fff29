package rowfmt

import "strconv"

// expandedEncoder writes psql's expanded form: a block of lines for each row, a
// line for each column.
type expandedEncoder struct {
	*tableEncoder
	names []string // in their safe form, padded to the widest
	cell1 []byte
}

func newExpanded(o *out, columns []column, null string) *expandedEncoder {
	e := &expandedEncoder{tableEncoder: newTable(o, columns, null)}
	widest := 0
	for _, w := range e.widths {
		widest = max(widest, min(w, maxPadding))
	}
	for i := range columns {
		name, _ := appendSafe(nil, []byte(columns[i].name))
		for w := e.widths[i]; w < widest; w++ {
			name = append(name, ' ')
		}
		e.names = append(e.names, string(name))
	}
	return e
}

func (e *expandedEncoder) batch(rows int) error {
	for row := range rows {
		e.rows++
		e.buf = append(e.buf, "-[ RECORD "...)
		e.buf = strconv.AppendInt(e.buf, e.rows, 10)
		e.buf = append(e.buf, " ]-\n"...)
		for i := range e.columns {
			e.buf = append(append(e.buf, e.names[i]...), " | "...)
			e.cell1, _ = e.tableEncoder.cell(e.cell1[:0], i, row)
			e.buf = append(append(e.buf, e.cell1...), '\n')
		}
		if e.full() {
			if err := e.flush(); err != nil {
				return err
			}
		}
	}
	return e.flush()
}

func (e *expandedEncoder) end() error {
	if len(e.columns) == 0 && e.rows == 0 {
		return nil // a command, not a result
	}
	if e.rows == 0 {
		e.buf = append(e.buf, "(0 rows)\n"...)
	}
	return nil
}

func (e *expandedEncoder) abort() {}
