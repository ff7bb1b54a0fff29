package child

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/memory"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/mask"
)

// layout is how a column's values are kept and read.
type layout uint8

const (
	// layoutText is offsets and bytes, as the server sends them. Text is valid
	// UTF-8: the server checks that even where its own encoding is SQL_ASCII.
	layoutText      layout = iota
	layoutUUID             // 16 bytes on the wire, 36 characters in Arrow
	layoutBool             // one bit
	layout16               // big endian on the wire, little endian in Arrow
	layout32               //
	layout64               //
	layoutDate             // days from 2000 on the wire, from 1970 in Arrow
	layoutTimestamp        // microseconds from 2000 on the wire, from 1970 in Arrow
)

const (
	// epochDays and epochMicros are from 1970-01-01 to 2000-01-01.
	epochDays   = 10957
	epochMicros = epochDays * 86400 * 1000000
	uuidText    = 36
)

// pgType is how a type of the server becomes one of Arrow.
type pgType struct {
	name   string
	binary bool
	layout layout
	arrow  arrow.DataType
}

var utf8Type = pgType{name: "", layout: layoutText, arrow: arrow.BinaryTypes.String}

func text(name string) pgType {
	t := utf8Type
	t.name = name
	return t
}

// pgTypes are the types with an OID of their own in every database, as far as
// they are common. Every other type goes as the server's text, with its name
// looked up.
var pgTypes = map[uint32]pgType{
	16:   {"bool", true, layoutBool, arrow.FixedWidthTypes.Boolean},
	17:   {"bytea", true, layoutText, arrow.BinaryTypes.Binary},
	20:   {"int8", true, layout64, arrow.PrimitiveTypes.Int64},
	21:   {"int2", true, layout16, arrow.PrimitiveTypes.Int16},
	23:   {"int4", true, layout32, arrow.PrimitiveTypes.Int32},
	26:   {"oid", true, layout32, arrow.PrimitiveTypes.Uint32},
	28:   {"xid", true, layout32, arrow.PrimitiveTypes.Uint32},
	29:   {"cid", true, layout32, arrow.PrimitiveTypes.Uint32},
	700:  {"float4", true, layout32, arrow.PrimitiveTypes.Float32},
	701:  {"float8", true, layout64, arrow.PrimitiveTypes.Float64},
	1082: {"date", true, layoutDate, arrow.FixedWidthTypes.Date32},
	1083: {"time", true, layout64, arrow.FixedWidthTypes.Time64us},
	1114: {"timestamp", true, layoutTimestamp, &arrow.TimestampType{Unit: arrow.Microsecond}},
	1184: {"timestamptz", true, layoutTimestamp, &arrow.TimestampType{Unit: arrow.Microsecond, TimeZone: "UTC"}},
	2950: {"uuid", true, layoutUUID, arrow.BinaryTypes.String},

	18: text("char"), 19: text("name"), 25: text("text"), 1042: text("bpchar"), 1043: text("varchar"), 705: text("unknown"),
	114: text("json"), 3802: text("jsonb"), 142: text("xml"), 1700: text("numeric"), 790: text("money"),
	1186: text("interval"), 1266: text("timetz"), 1560: text("bit"), 1562: text("varbit"),
	869: text("inet"), 650: text("cidr"), 829: text("macaddr"), 774: text("macaddr8"),
	2278: text("void"), 2249: text("record"), 24: text("regproc"), 2205: text("regclass"), 2206: text("regtype"), 27: text("tid"),
	3614: text("tsvector"), 3615: text("tsquery"), 5069: text("xid8"),
	1000: text("_bool"), 1001: text("_bytea"), 1005: text("_int2"), 1007: text("_int4"), 1016: text("_int8"), 1009: text("_text"),
	1015: text("_varchar"), 1021: text("_float4"), 1022: text("_float8"), 1231: text("_numeric"), 1182: text("_date"),
	1115: text("_timestamp"), 1185: text("_timestamptz"), 2951: text("_uuid"), 199: text("_json"), 3807: text("_jsonb"),
}

// width is the size of a value in Arrow's data buffer; 0 for what varies.
func (l layout) width() int {
	switch l {
	case layout16:
		return 2
	case layout32, layoutDate:
		return 4
	case layout64, layoutTimestamp:
		return 8
	}
	return 0
}

// column gathers one column's values of one batch. Its buffers are used again
// for the next batch.
type column struct {
	layout  layout
	binary  bool
	name    string
	arrow   arrow.DataType
	data    []byte
	offsets []byte // little-endian int32, layoutText and layoutUUID only
	valid   []byte // bitmap; in use from the first NULL of a batch on
	nulls   int

	// oid is PostgreSQL's type; mask hides all values, texts what matches in
	// them; nil: they don't. spare is the buffer that rewritten values go to.
	oid   uint32
	mask  *mask.Column
	texts *mask.Texts
	spare []byte
}

func (c *column) reset() {
	c.data, c.offsets, c.valid = recycle(c.data), recycle(c.offsets), recycle(c.valid)
	c.nulls = 0
	if c.layout <= layoutUUID {
		c.offsets = append(c.offsets, 0, 0, 0, 0)
	}
}

// recycle empties a buffer, and lets go of one that a giant value made.
func recycle(b []byte) []byte {
	if cap(b) > 4<<20 {
		return nil
	}
	return b[:0]
}

// setNull adds a NULL as value n of the batch.
func (c *column) setNull(n int) {
	if c.nulls == 0 {
		// So far all were valid.
		c.valid = c.valid[:0]
		for range n / 8 {
			c.valid = append(c.valid, 0xff)
		}
		c.valid = append(c.valid, byte(1<<(n%8)-1))
	} else if n%8 == 0 {
		c.valid = append(c.valid, 0)
	}
	c.nulls++
	switch c.layout {
	case layoutText, layoutUUID:
		c.endValue()
	case layoutBool:
		if n%8 == 0 {
			c.data = append(c.data, 0)
		}
	default:
		c.data = append(c.data, make([]byte, c.layout.width())...)
	}
}

// markValid is for a value n after the first NULL.
func (c *column) markValid(n int) {
	if n%8 == 0 {
		c.valid = append(c.valid, 1)
	} else {
		c.valid[n/8] |= 1 << (n % 8)
	}
}

func (c *column) endValue() {
	c.offsets = binary.LittleEndian.AppendUint32(c.offsets, uint32(len(c.data)))
}

// set adds a value as the server sent it as value n of the batch.
func (c *column) set(n int, v []byte) error {
	if c.nulls != 0 {
		c.markValid(n)
	}
	switch c.layout {
	case layoutText:
		c.data = append(c.data, v...)
		c.endValue()
		return nil
	case layout64:
		if len(v) != 8 {
			break
		}
		c.data = binary.LittleEndian.AppendUint64(c.data, binary.BigEndian.Uint64(v))
		return nil
	case layoutTimestamp:
		if len(v) != 8 {
			break
		}
		micros := int64(binary.BigEndian.Uint64(v))
		if micros != math.MaxInt64 && micros != math.MinInt64 {
			if micros > math.MaxInt64-1-epochMicros {
				return &valueError{c.name, "a time after the year 294246 does not fit Arrow's microseconds: cast it to text"}
			}
			micros += epochMicros
		}
		c.data = binary.LittleEndian.AppendUint64(c.data, uint64(micros))
		return nil
	case layout32:
		if len(v) != 4 {
			break
		}
		c.data = binary.LittleEndian.AppendUint32(c.data, binary.BigEndian.Uint32(v))
		return nil
	case layoutDate:
		if len(v) != 4 {
			break
		}
		days := int32(binary.BigEndian.Uint32(v))
		if days != math.MaxInt32 && days != math.MinInt32 {
			days += epochDays // the largest date, 5874897-12-31, fits
		}
		c.data = binary.LittleEndian.AppendUint32(c.data, uint32(days))
		return nil
	case layout16:
		if len(v) != 2 {
			break
		}
		c.data = append(c.data, v[1], v[0])
		return nil
	case layoutBool:
		if len(v) != 1 {
			break
		}
		if n%8 == 0 {
			c.data = append(c.data, 0)
		}
		if v[0] != 0 {
			c.data[n/8] |= 1 << (n % 8)
		}
		return nil
	case layoutUUID:
		if len(v) != 16 {
			break
		}
		at := len(c.data)
		c.data = append(c.data, "00000000-0000-0000-0000-000000000000"...)
		u := c.data[at:]
		hex.Encode(u[0:8], v[0:4])
		hex.Encode(u[9:13], v[4:6])
		hex.Encode(u[14:18], v[6:8])
		hex.Encode(u[19:23], v[8:10])
		hex.Encode(u[24:36], v[10:16])
		c.endValue()
		return nil
	}
	return fmt.Errorf("%w: a value of %d bytes in column %q", errProtocol, len(v), c.name)
}

// size is how many bytes the column's buffers have, without padding.
func (c *column) size() int {
	size := len(c.data) + len(c.offsets)
	if c.nulls > 0 {
		size += len(c.valid)
	}
	return size
}

// array wraps the buffers of n values; it is valid until reset.
func (c *column) array(n int) arrow.Array {
	var valid *memory.Buffer
	if c.nulls > 0 {
		valid = memory.NewBufferBytes(c.valid)
	}
	buffers := []*memory.Buffer{valid, memory.NewBufferBytes(c.data)}
	if c.layout <= layoutUUID {
		buffers = []*memory.Buffer{valid, memory.NewBufferBytes(c.offsets), memory.NewBufferBytes(c.data)}
	}
	data := array.NewData(c.arrow, n, buffers, nil, c.nulls, 0)
	defer data.Release()
	return array.MakeFromData(data)
}

// valueError is a value that Arrow can't hold: the statement fails rather than
// give a wrong one.
type valueError struct {
	column, what string
}

func (e *valueError) Error() string { return fmt.Sprintf("column %q: %s", e.column, e.what) }
