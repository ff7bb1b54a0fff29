package rowfmt

import "bytes"

// piece is how much of a long value is encoded before the buffer is looked at,
// in bytes, so that a value of 100 MB does not need a buffer of 100 MB.
const piece = 32 << 10

type csvEncoder struct {
	*out
	columns []column
}

func newCSV(o *out, columns []column) *csvEncoder { return &csvEncoder{o, columns} }

func (e *csvEncoder) begin() error {
	if len(e.columns) == 0 {
		return nil
	}
	for i := range e.columns {
		if i > 0 {
			e.buf = append(e.buf, ',')
		}
		if name := e.columns[i].name; name != "" { // a bare "" would be an odd header
			e.text([]byte(name))
		}
	}
	e.buf = append(e.buf, '\n')
	return e.flush()
}

func (e *csvEncoder) batch(rows int) error {
	columns := e.columns
	for row := range rows {
		for i := range columns {
			c := &columns[i]
			if i > 0 {
				e.buf = append(e.buf, ',')
			}
			if c.null(row) {
				continue
			}
			switch c.kind {
			case kindUTF8:
				e.text(c.bytes(row))
			case kindBinary:
				e.buf = append(e.buf, '\\', 'x')
				e.hex(c.bytes(row))
			case kindBool:
				if c.bool(row) {
					e.buf = append(e.buf, "true"...)
				} else {
					e.buf = append(e.buf, "false"...)
				}
			default:
				e.buf = appendPlain(e.buf, c, row)
			}
		}
		e.buf = append(e.buf, '\n')
		if e.full() {
			if err := e.flush(); err != nil {
				return err
			}
		}
	}
	return e.flush()
}

func (e *csvEncoder) end() error { return nil }
func (e *csvEncoder) abort()     {}

// hex appends v as hex digits, flushing on the way.
func (o *out) hex(v []byte) {
	for len(v) > piece {
		o.buf = appendHex(o.buf, v[:piece])
		v = v[piece:]
		_ = o.flush() // the error sticks
	}
	o.buf = appendHex(o.buf, v)
}

// special marks the bytes that need quotes.
var special = [256]bool{'"': true, ',': true, '\n': true, '\r': true}

func (e *csvEncoder) text(v []byte) {
	if len(v) <= piece {
		quote := len(v) == 0 || (len(v) == 2 && v[0] == '\\' && v[1] == '.') // COPY's end mark
		for _, c := range v {
			if special[c] {
				quote = true
				break
			}
		}
		if !quote {
			e.buf = append(e.buf, v...)
			return
		}
	}
	e.buf = append(e.buf, '"')
	for len(v) > piece {
		e.buf = appendDoubled(e.buf, v[:piece])
		v = v[piece:]
		_ = e.flush() // the error sticks
	}
	e.buf = append(appendDoubled(e.buf, v), '"')
}

// appendDoubled appends v with every quote doubled.
func appendDoubled(b, v []byte) []byte {
	for {
		i := bytes.IndexByte(v, '"')
		if i < 0 {
			return append(b, v...)
		}
		b = append(append(b, v[:i+1]...), '"')
		v = v[i+1:]
	}
}
