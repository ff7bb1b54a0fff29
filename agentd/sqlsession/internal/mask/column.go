package mask

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"math"
	"math/big"
	"strconv"
	"unicode/utf8"

	"github.com/postern-dev/postern/proto/textmask"
)

// Kind is what becomes of a value; the words are those of package policy.
type Kind string

// The kinds of masks.
const (
	Redact  Kind = "redact"
	Hash    Kind = "hash"
	Partial Kind = "partial"
	Null    Kind = "null"
	Noise   Kind = "noise"
)

// Rule is a kind with its numbers.
type Rule struct {
	Kind  Kind
	Keep  int     // the last characters that Partial leaves
	Noise float64 // the largest part of itself by which Noise moves a number
}

// The types of PostgreSQL that are told apart, by OID. Those from firstUser on
// are the database's own: enums, composites, extensions.
const (
	oidBool    = 16
	oidChar    = 18
	oidName    = 19
	oidInt8    = 20
	oidInt2    = 21
	oidInt4    = 23
	oidText    = 25
	oidJSON    = 114
	oidXML     = 142
	oidFloat4  = 700
	oidFloat8  = 701
	oidUnknown = 705
	oidBpchar  = 1042
	oidVarchar = 1043
	oidNumeric = 1700
	oidRecord  = 2249
	oidUUID    = 2950
	oidJSONB   = 3802
	firstUser  = 16384
)

// OIDText is the type of a column whose values became texts.
const OIDText = oidText

// class is what a mask has to know of a type.
type class uint8

const (
	other class = iota
	text
	jsonText
	uuid
	integer
	float
	numeric
)

func classOf(oid uint32) class {
	switch oid {
	case oidText, oidVarchar, oidBpchar, oidName, oidChar, oidUnknown, oidXML, oidRecord:
		return text
	case oidJSON, oidJSONB:
		return jsonText
	case oidUUID:
		return uuid
	case oidInt2, oidInt4, oidInt8:
		return integer
	case oidFloat4, oidFloat8:
		return float
	case oidNumeric:
		return numeric
	}
	if oid >= firstUser {
		return text
	}
	return other
}

// action is what is done with each value.
type action uint8

const (
	toNull action = iota
	toMark
	toJSONMark
	toHash
	toUUID
	toPartial
	toNoise
)

// Column masks the values of one column of a result. Not for concurrent use.
type Column struct {
	rule   Rule
	oid    uint32
	action action
	typ    uint32
	noise  []byte // names the column to the noise
	mac    *mac
	buf    []byte
}

// NewColumn returns the mask of a column whose values have the type oid. name
// is the column that they come from (SCHEMA.TABLE.COLUMN): it keeps the noise of
// two columns apart. key is the organization's, at least 16 bytes.
func NewColumn(rule Rule, oid uint32, name string, key []byte) *Column {
	c := &Column{rule: rule, oid: oid, typ: oid, noise: []byte("noise\x00" + name + "\x00")}
	c.mac = newMAC(key)
	kind := classOf(oid)
	switch rule.Kind {
	case Hash:
		c.action, c.typ = toHash, oidText
		if kind == uuid {
			c.action, c.typ = toUUID, oidUUID
		}
	case Partial:
		switch kind {
		case text, integer, float, numeric, uuid:
			c.action, c.typ = toPartial, oidText
		default:
			c.redact(kind)
		}
	case Noise:
		if kind == integer || kind == float || kind == numeric {
			c.action = toNoise
		}
	case Null:
	default:
		c.redact(kind)
	}
	return c
}

func (c *Column) redact(kind class) {
	switch kind {
	case text:
		c.action, c.typ = toMark, oidText
	case jsonText:
		c.action = toJSONMark
	default:
		c.action = toNull
	}
}

// Type is the OID of the masked values' type: that of the values, or text.
func (c *Column) Type() uint32 { return c.typ }

// NeedsText tells whether Apply wants the server's text form. Where it does
// not, values may come in any format.
func (c *Column) NeedsText() bool {
	return c.action == toHash || c.action == toUUID || c.action == toPartial || c.action == toNoise && c.oid == oidNumeric
}

// AlwaysNull tells whether every value becomes NULL.
func (c *Column) AlwaysNull() bool { return c.action == toNull }

// Grows is by how many bytes a value may become longer.
func (c *Column) Grows() int { return 36 }

// Noisy tells whether values stay numbers of their own type: Int or Float is
// for those that are not text.
func (c *Column) Noisy() bool { return c.action == toNoise }

// Apply appends what stands for value to dst. value is the server's text form
// (format 0), or binary form (1) where NeedsText is false; out is the format of
// the result. null means that it is NULL, and dst as it was.
func (c *Column) Apply(dst, value []byte, in, out int16) (result []byte, null bool) {
	switch c.action {
	case toMark:
		return append(dst, textmask.Mark...), false
	case toJSONMark:
		if out == 1 && c.oid == oidJSONB {
			dst = append(dst, 1)
		}
		return append(dst, `"`+textmask.Mark+`"`...), false
	case toHash:
		sum := c.mac.digest(nil, c.canonical(value))
		return appendHash(dst, sum), false
	case toUUID:
		sum := c.mac.digest(nil, c.canonical(value))
		sum[6], sum[8] = sum[6]&0x0f|0x80, sum[8]&0x3f|0x80
		if out == 1 {
			return append(dst, sum[:16]...), false
		}
		return appendUUID(dst, sum[:16]), false
	case toPartial:
		return appendPartial(dst, value, c.rule.Keep), false
	case toNoise:
		return c.applyNoise(dst, value, in, out)
	}
	return dst, true
}

// appendHash appends the 16 bytes of a digest as 26 characters: base32 in lower case,
// first bits first, as RFC 4648 has it.
func appendHash(dst, sum []byte) []byte {
	hi, lo := binary.BigEndian.Uint64(sum), binary.BigEndian.Uint64(sum[8:])
	var out [hashLength]byte
	// Two characters at a time; the 26 have two bits more than the digest.
	lo, hi = lo<<2, hi<<2|lo>>62
	top := byte(sum[0] >> 6)
	for i := hashLength - 2; i > 0; i -= 2 {
		pair := &digitPairs[lo&1023]
		out[i], out[i+1] = pair[0], pair[1]
		lo = lo>>10 | hi<<54
		hi >>= 10
		if i == hashLength-2 {
			hi |= uint64(top) << 54 // what the shift by two bits pushed out
		}
	}
	pair := &digitPairs[lo&1023]
	out[0], out[1] = pair[0], pair[1]
	return append(dst, out[:]...)
}

// hashLength is the length of a hash as text.
const hashLength = 26

// digitPairs are the two characters of each ten bits.
var digitPairs = func() (pairs [1024][2]byte) {
	const digits = "abcdefghijklmnopqrstuvwxyz234567"
	for i := range pairs {
		pairs[i] = [2]byte{digits[i>>5], digits[i&31]}
	}
	return pairs
}()

func appendUUID(dst, u []byte) []byte {
	for i, n := range []int{4, 2, 2, 2, 6} {
		if i > 0 {
			dst = append(dst, '-')
		}
		dst = hex.AppendEncode(dst, u[:n])
		u = u[n:]
	}
	return dst
}

// canonical is the text that is hashed: the same for values that are equal,
// however they are written.
func (c *Column) canonical(value []byte) []byte {
	switch c.oid {
	case oidBpchar:
		return bytes.TrimRight(value, " ")
	case oidNumeric:
		if bytes.IndexByte(value, '.') >= 0 {
			value = bytes.TrimRight(bytes.TrimRight(value, "0"), ".")
		}
	}
	return value
}

// appendPartial hides all but the last keep characters, and at least half of
// them.
func appendPartial(dst, value []byte, keep int) []byte {
	if keep <= 0 {
		return appendStars(dst, utf8.RuneCount(value))
	}
	n := utf8.RuneCount(value)
	keep = min(keep, n/2)
	if n == len(value) { // ASCII
		return append(appendStars(dst, n-keep), value[n-keep:]...)
	}
	at := len(value)
	for range keep {
		_, size := utf8.DecodeLastRune(value[:at])
		at -= size
	}
	return append(appendStars(dst, n-keep), value[at:]...)
}

func appendStars(dst []byte, n int) []byte {
	const stars = "****************************************************************"
	for n > len(stars) {
		dst, n = append(dst, stars...), n-len(stars)
	}
	return append(dst, stars[:n]...)
}

// factor is by what a number is multiplied: the same for the same value of the
// same column, so that asking again does not average it out. Near 1.
func (c *Column) factor(canonical []byte) float64 {
	sum := c.mac.digest(c.noise, canonical)
	u := float64(binary.BigEndian.Uint64(sum)>>11) / (1 << 53) // [0, 1)
	return 1 + c.rule.Noise*(2*u-1)
}

// Int is a whole number with its noise, within bits.
func (c *Column) Int(v int64, bits int) int64 {
	c.buf = strconv.AppendInt(c.buf[:0], v, 10)
	f := c.factor(c.buf)
	limit := math.Ldexp(1, bits-1)
	moved := math.Round(float64(v) * f)
	switch {
	case moved >= limit:
		return int64(1)<<(bits-1) - 1
	case moved < -limit:
		return -1 << (bits - 1)
	}
	return int64(moved)
}

// Float is a number with its noise; NaN and infinities stay.
func (c *Column) Float(v float64, bits int) float64 {
	c.buf = strconv.AppendFloat(c.buf[:0], v, 'g', -1, bits)
	moved := v * c.factor(c.buf)
	if math.IsInf(moved, 0) || bits == 32 && math.IsInf(float64(float32(moved)), 0) {
		return v * (1 - c.rule.Noise/2)
	}
	return moved
}

func (c *Column) applyNoise(dst, value []byte, in, out int16) ([]byte, bool) {
	switch c.oid {
	case oidNumeric:
		moved, ok := c.decimal(value)
		if !ok {
			return dst, true
		}
		return append(dst, moved...), false
	case oidFloat4, oidFloat8:
		bits := 64
		if c.oid == oidFloat4 {
			bits = 32
		}
		var v float64
		switch {
		case in == 0:
			var err error
			if v, err = strconv.ParseFloat(string(value), bits); err != nil {
				return dst, true
			}
		case len(value) == 4:
			v = float64(math.Float32frombits(binary.BigEndian.Uint32(value)))
		case len(value) == 8:
			v = math.Float64frombits(binary.BigEndian.Uint64(value))
		default:
			return dst, true
		}
		v = c.Float(v, bits)
		switch {
		case out == 0 && math.IsInf(v, 1):
			return append(dst, "Infinity"...), false
		case out == 0 && math.IsInf(v, -1):
			return append(dst, "-Infinity"...), false
		case out == 0:
			return strconv.AppendFloat(dst, v, 'g', -1, bits), false
		case bits == 32:
			return binary.BigEndian.AppendUint32(dst, math.Float32bits(float32(v))), false
		}
		return binary.BigEndian.AppendUint64(dst, math.Float64bits(v)), false
	}
	bits := map[uint32]int{oidInt2: 16, oidInt4: 32, oidInt8: 64}[c.oid]
	var v int64
	switch {
	case in == 0:
		var err error
		if v, err = strconv.ParseInt(string(value), 10, 64); err != nil {
			return dst, true
		}
	case len(value) == 2:
		v = int64(int16(binary.BigEndian.Uint16(value)))
	case len(value) == 4:
		v = int64(int32(binary.BigEndian.Uint32(value)))
	case len(value) == 8:
		v = int64(binary.BigEndian.Uint64(value))
	default:
		return dst, true
	}
	v = c.Int(v, bits)
	if out == 0 {
		return strconv.AppendInt(dst, v, 10), false
	}
	switch bits {
	case 16:
		return binary.BigEndian.AppendUint16(dst, uint16(v)), false
	case 32:
		return binary.BigEndian.AppendUint32(dst, uint32(v)), false
	}
	return binary.BigEndian.AppendUint64(dst, uint64(v)), false
}

// maxDigits is the longest numeric that gets noise; longer ones become NULL, as
// arithmetic on them takes too long.
const maxDigits = 2000

// decimal is a numeric's text with its noise, of the same scale.
func (c *Column) decimal(value []byte) ([]byte, bool) {
	if len(value) == 0 || len(value) > maxDigits {
		return nil, false
	}
	switch string(value) {
	case "NaN", "Infinity", "-Infinity":
		return value, true
	}
	scale := 0
	digits := value
	if point := bytes.IndexByte(value, '.'); point >= 0 {
		scale = len(value) - point - 1
		digits = append(append(c.buf[:0], value[:point]...), value[point+1:]...)
		c.buf = digits
	}
	n, ok := new(big.Int).SetString(string(digits), 10)
	if !ok {
		return nil, false
	}
	const unit = 1 << 40
	n.Mul(n, big.NewInt(int64(math.Round(c.factor(c.canonical(value))*unit))))
	// Rounded to the nearest: floor(n/unit + 1/2).
	n.Add(n, big.NewInt(unit/2))
	n.Rsh(n, 40)
	out := n.Abs(n).Append(nil, 10)
	if missing := scale + 1 - len(out); missing > 0 {
		out = append(bytes.Repeat([]byte("0"), missing), out...)
	}
	if scale > 0 {
		at := len(out) - scale
		out = append(out[:at], append([]byte("."), out[at:]...)...)
	}
	if value[0] == '-' && len(bytes.Trim(out, "0.")) > 0 {
		out = append([]byte("-"), out...)
	}
	return out, true
}
