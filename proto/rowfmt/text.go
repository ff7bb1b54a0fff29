package rowfmt

import (
	"math"
	"strconv"
)

// appendFloat appends v as PostgreSQL does: the shortest digits that read back
// as v, with an exponent below 1e-4 and from 10^digits on (15 for float8, 6 for
// float4). v must be finite.
func appendFloat(b []byte, v float64, bits int) []byte {
	a := math.Abs(v)
	low, high := 1e-4, 1e15
	if bits == 32 {
		low, high = float64(float32(1e-4)), 1e6
	}
	if a != 0 && (a < low || a >= high) {
		return strconv.AppendFloat(b, v, 'e', -1, bits)
	}
	// Whole numbers are frequent and much cheaper to print as such.
	if whole := int64(v); float64(whole) == v && (whole != 0 || !math.Signbit(v)) {
		return strconv.AppendInt(b, whole, 10)
	}
	return strconv.AppendFloat(b, v, 'f', -1, bits)
}

// nonFinite names a float that has no digits; "" for one that has.
func nonFinite(v float64) string {
	switch {
	case v-v == 0:
		return ""
	case math.IsNaN(v):
		return "NaN"
	case v > 0:
		return "Infinity"
	default:
		return "-Infinity"
	}
}

const (
	microsPerSecond = 1_000_000
	microsPerDay    = 86_400 * microsPerSecond
)

// appendTimestamp appends microseconds since 1970 as date, separator, time and
// zone; infinity for the ends of the range.
func appendTimestamp(b []byte, us int64, separator byte, zone string) []byte {
	switch us {
	case math.MaxInt64:
		return append(b, "infinity"...)
	case math.MinInt64:
		return append(b, "-infinity"...)
	}
	day, rest := us/microsPerDay, us%microsPerDay
	if rest < 0 {
		rest += microsPerDay
		day--
	}
	b, bc := appendCivil(b, day)
	b = append(b, separator)
	b = appendTime(b, rest)
	b = append(b, zone...)
	if bc {
		b = append(b, " BC"...)
	}
	return b
}

// appendDate appends days since 1970; infinity for the ends of the range.
func appendDate(b []byte, day int32) []byte {
	switch day {
	case math.MaxInt32:
		return append(b, "infinity"...)
	case math.MinInt32:
		return append(b, "-infinity"...)
	}
	b, bc := appendCivil(b, int64(day))
	if bc {
		b = append(b, " BC"...)
	}
	return b
}

// appendCivil appends year-month-day of the proleptic Gregorian calendar; bc
// says that the year counts backwards from 1 BC. The method is Howard Hinnant's
// civil_from_days (https://howardhinnant.github.io/date_algorithms.html).
func appendCivil(b []byte, day int64) (_ []byte, bc bool) {
	day += 719_468 // since 0000-03-01
	era := day / 146_097
	if day < 0 {
		era = (day - 146_096) / 146_097
	}
	doe := uint32(day - era*146_097)
	yoe := (doe - doe/1460 + doe/36_524 - doe/146_096) / 365
	year := int64(yoe) + era*400
	doy := doe - (365*yoe + yoe/4 - yoe/100)
	mp := (5*doy + 2) / 153
	d := doy - (153*mp+2)/5 + 1
	m := mp + 3
	if m > 12 {
		m -= 12
		year++
	}
	if year <= 0 {
		year, bc = 1-year, true
	}
	if year > 9999 {
		b = strconv.AppendInt(b, year, 10)
	} else {
		b = append2(append2(b, uint32(year/100)), uint32(year%100))
	}
	b = append2(append(b, '-'), m)
	b = append2(append(b, '-'), d)
	return b, bc
}

// appendTime appends microseconds since midnight; 24:00:00 is a time too. What
// is outside the day, which no database says, is appended as it counts.
func appendTime(b []byte, us int64) []byte {
	if us < 0 || us > microsPerDay {
		return append(strconv.AppendInt(b, us, 10), "us"...)
	}
	seconds, micros := uint32(us/microsPerSecond), uint32(us%microsPerSecond)
	b = append2(b, seconds/3600)
	b = append2(append(b, ':'), seconds/60%60)
	b = append2(append(b, ':'), seconds%60)
	if micros == 0 {
		return b
	}
	b = append(b, '.')
	b = append2(append2(append2(b, micros/10_000), micros/100%100), micros%100)
	for b[len(b)-1] == '0' {
		b = b[:len(b)-1]
	}
	return b
}

const digitPairs = "00010203040506070809101112131415161718192021222324252627282930313233343536373839" +
	"4041424344454647484950515253545556575859606162636465666768697071727374757677787980818283848586878889" +
	"90919293949596979899"

// append2 appends v, below 100, as two digits.
func append2(b []byte, v uint32) []byte {
	return append(b, digitPairs[2*v], digitPairs[2*v+1])
}

const hexDigits = "0123456789abcdef"

func appendHex(b, v []byte) []byte {
	for _, c := range v {
		b = append(b, hexDigits[c>>4], hexDigits[c&15])
	}
	return b
}

// appendPlain appends a value whose text needs neither quotes nor escapes, in
// the form that csv and table share: everything but bool and variable length.
func appendPlain(b []byte, c *column, row int) []byte {
	switch c.kind {
	case kindInt8:
		return strconv.AppendInt(b, int64(int8(c.data[row])), 10)
	case kindInt16:
		return strconv.AppendInt(b, int64(int16(uint16(c.data[2*row])|uint16(c.data[2*row+1])<<8)), 10)
	case kindInt32:
		return strconv.AppendInt(b, int64(int32(c.u32(row))), 10)
	case kindInt64:
		return strconv.AppendInt(b, int64(c.u64(row)), 10)
	case kindUint8:
		return strconv.AppendUint(b, uint64(c.data[row]), 10)
	case kindUint16:
		return strconv.AppendUint(b, uint64(c.data[2*row])|uint64(c.data[2*row+1])<<8, 10)
	case kindUint32:
		return strconv.AppendUint(b, uint64(c.u32(row)), 10)
	case kindUint64:
		return strconv.AppendUint(b, c.u64(row), 10)
	case kindFloat32, kindFloat64:
		v, bits := floatOf(c, row)
		if name := nonFinite(v); name != "" {
			return append(b, name...)
		}
		return appendFloat(b, v, bits)
	case kindDate:
		return appendDate(b, int32(c.u32(row)))
	case kindTimestamp:
		return appendTimestamp(b, int64(c.u64(row)), ' ', "")
	case kindTimestampUTC:
		return appendTimestamp(b, int64(c.u64(row)), ' ', "+00")
	case kindTime:
		return appendTime(b, int64(c.u64(row)))
	}
	return b
}

func floatOf(c *column, row int) (v float64, bits int) {
	if c.kind == kindFloat32 {
		return float64(math.Float32frombits(c.u32(row))), 32
	}
	return math.Float64frombits(c.u64(row)), 64
}
