package mask

import (
	"encoding/binary"
	"encoding/hex"
	"math"
	"strconv"
	"sync"

	"github.com/jackc/pgx/v5/pgtype"
)

// The types whose binary form is known besides those of column.go.
const (
	oidBytea   = 17
	oidDate    = 1082
	oidStamp   = 1114
	oidStampTZ = 1184
)

// types converts what has no short way.
var types = sync.OnceValue(pgtype.NewMap)

// textOf is the text form of a value in binary format; not ok where that is not
// known.
func textOf(dst []byte, oid uint32, value []byte) (text []byte, ok bool) {
	switch oid {
	case oidText, oidVarchar, oidBpchar, oidName, oidChar, oidUnknown, oidXML, oidJSON:
		return append(dst, value...), true
	case oidJSONB:
		if len(value) == 0 || value[0] != 1 {
			return nil, false
		}
		return append(dst, value[1:]...), true
	case oidBool:
		if len(value) != 1 {
			return nil, false
		}
		if value[0] != 0 {
			return append(dst, 't'), true
		}
		return append(dst, 'f'), true
	case oidInt2:
		if len(value) == 2 {
			return strconv.AppendInt(dst, int64(int16(binary.BigEndian.Uint16(value))), 10), true
		}
	case oidInt4:
		if len(value) == 4 {
			return strconv.AppendInt(dst, int64(int32(binary.BigEndian.Uint32(value))), 10), true
		}
	case oidInt8:
		if len(value) == 8 {
			return strconv.AppendInt(dst, int64(binary.BigEndian.Uint64(value)), 10), true
		}
	case oidFloat4:
		if len(value) == 4 {
			return appendFloat(dst, float64(math.Float32frombits(binary.BigEndian.Uint32(value))), 32), true
		}
	case oidFloat8:
		if len(value) == 8 {
			return appendFloat(dst, math.Float64frombits(binary.BigEndian.Uint64(value)), 64), true
		}
	case oidUUID:
		if len(value) == 16 {
			return appendUUID(dst, value), true
		}
	case oidBytea:
		return hex.AppendEncode(append(dst, `\x`...), value), true
	case oidNumeric:
		var n pgtype.Numeric
		if types().Scan(oidNumeric, pgtype.BinaryFormatCode, value, &n) != nil {
			return nil, false
		}
		out, err := types().Encode(oidNumeric, pgtype.TextFormatCode, n, dst)
		return out, err == nil
	case oidDate:
		if len(value) == 4 {
			var d pgtype.Date
			if types().Scan(oid, pgtype.BinaryFormatCode, value, &d) != nil {
				return nil, false
			}
			out, err := types().Encode(oid, pgtype.TextFormatCode, d, dst)
			return out, err == nil
		}
	}
	return nil, false
}

// appendFloat writes a number as the server does: the shortest text that gives it
// back, with an exponent below 1e-4 and from 1e15 (float4: 1e6) on.
func appendFloat(dst []byte, v float64, bits int) []byte {
	switch {
	case math.IsNaN(v):
		return append(dst, "NaN"...)
	case math.IsInf(v, 1):
		return append(dst, "Infinity"...)
	case math.IsInf(v, -1):
		return append(dst, "-Infinity"...)
	}
	limit := 1e15
	if bits == 32 {
		limit = 1e6
	}
	if a := math.Abs(v); a != 0 && (a < 1e-4 || a >= limit) {
		return strconv.AppendFloat(dst, v, 'e', -1, bits)
	}
	return strconv.AppendFloat(dst, v, 'f', -1, bits)
}

// binaryNumeric is the binary form of a numeric's text.
func binaryNumeric(dst, text []byte) ([]byte, bool) {
	var n pgtype.Numeric
	if types().Scan(oidNumeric, pgtype.TextFormatCode, text, &n) != nil {
		return dst, false
	}
	out, err := types().Encode(oidNumeric, pgtype.BinaryFormatCode, n, dst)
	return out, err == nil
}
