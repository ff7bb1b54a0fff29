package rowfmt

import (
	"encoding/binary"
	"fmt"
)

// flat reads FlatBuffers (https://flatbuffers.dev/internals/) with every access
// checked; the first fault sticks in err and later reads return zero. Tables are
// known by their position in b; 0 is an absent table, since the root is never
// at 0.
type flat struct {
	b   []byte
	err error
	// budget bounds the bytes that strings may take together: a small buffer may
	// point at one long string many times over.
	budget int
}

func newFlat(b []byte) *flat { return &flat{b: b, budget: len(b)} }

func (f *flat) fail(what string) {
	if f.err == nil {
		f.err = fmt.Errorf("%w: %s", ErrGarbled, what)
	}
}

func (f *flat) has(pos, n int) bool {
	if f.err != nil {
		return false
	}
	if pos < 0 || n < 0 || pos > len(f.b)-n {
		f.fail("its metadata points outside itself")
		return false
	}
	return true
}

func (f *flat) u8(pos int) byte {
	if !f.has(pos, 1) {
		return 0
	}
	return f.b[pos]
}

func (f *flat) u16(pos int) uint16 {
	if !f.has(pos, 2) {
		return 0
	}
	return binary.LittleEndian.Uint16(f.b[pos:])
}

func (f *flat) u32(pos int) uint32 {
	if !f.has(pos, 4) {
		return 0
	}
	return binary.LittleEndian.Uint32(f.b[pos:])
}

func (f *flat) i64(pos int) int64 {
	if !f.has(pos, 8) {
		return 0
	}
	return int64(binary.LittleEndian.Uint64(f.b[pos:]))
}

// follow returns where the offset at pos leads.
func (f *flat) follow(pos int) int {
	to := int(f.u32(pos))
	if to == 0 || !f.has(pos, to) {
		f.fail("its metadata has a null offset")
		return 0
	}
	return pos + to
}

func (f *flat) root() int { return f.follow(0) }

// field returns the position of a table's field by its number; 0 if absent.
func (f *flat) field(table, number int) int {
	if table == 0 || f.err != nil {
		return 0
	}
	vtable := table - int(int32(f.u32(table)))
	size := int(f.u16(vtable))
	entry := 4 + 2*number
	if entry+2 > size {
		return 0
	}
	offset := int(f.u16(vtable + entry))
	if offset == 0 {
		return 0
	}
	return table + offset
}

// table returns a field that is a table; 0 if absent.
func (f *flat) table(table, number int) int {
	if pos := f.field(table, number); pos != 0 {
		return f.follow(pos)
	}
	return 0
}

// vector returns the first element and the length of a field that is a vector
// with elements of size bytes.
func (f *flat) vector(table, number, size int) (first, n int) {
	pos := f.field(table, number)
	if pos == 0 {
		return 0, 0
	}
	pos = f.follow(pos)
	n = int(f.u32(pos))
	if n > len(f.b)/size || !f.has(pos+4, n*size) {
		f.fail("its metadata has a vector longer than itself")
		return 0, 0
	}
	return pos + 4, n
}

func (f *flat) text(table, number int) string {
	first, n := f.vector(table, number, 1)
	if n == 0 || f.err != nil {
		return ""
	}
	if f.budget -= n; f.budget < 0 {
		f.fail("its metadata repeats a string too often")
		return ""
	}
	return string(f.b[first : first+n])
}

func (f *flat) int16Field(table, number int, absent int16) int16 {
	if pos := f.field(table, number); pos != 0 {
		return int16(f.u16(pos))
	}
	return absent
}

func (f *flat) int32Field(table, number int, absent int32) int32 {
	if pos := f.field(table, number); pos != 0 {
		return int32(f.u32(pos))
	}
	return absent
}

func (f *flat) int64Field(table, number int) int64 {
	if pos := f.field(table, number); pos != 0 {
		return f.i64(pos)
	}
	return 0
}

func (f *flat) byteField(table, number int) byte {
	if pos := f.field(table, number); pos != 0 {
		return f.u8(pos)
	}
	return 0
}
