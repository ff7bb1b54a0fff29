package lazy

import (
	"slices"
	"sort"
)

// span is memory that is missing: [start, end), whose content is in file from off on.
type span struct {
	start, end uint64
	file       int // index of pages files
	off        int64
	// wipe: a fork's is zeros (MADV_WIPEONFORK).
	wipe bool
}

// from is the part of s from address at on.
func (s span) from(at uint64) span {
	s.off += int64(at - s.start)
	s.start = at
	return s
}

// missing are the ranges that a space lacks, in order, none touching the bytes of another.
type missing []span

// after is the index of the first range that ends after addr.
func (m missing) after(addr uint64) int {
	return sort.Search(len(m), func(i int) bool { return m[i].end > addr })
}

// at returns what is missing from addr on, to the end of its range; false: addr is not.
func (m missing) at(addr uint64) (span, bool) {
	i := m.after(addr)
	if i == len(m) || m[i].start > addr {
		return span{}, false
	}
	return m[i].from(addr), true
}

// cut takes [start, end) out and returns what was there.
func (m *missing) cut(start, end uint64) []span {
	if start >= end {
		return nil
	}
	i := m.after(start)
	j := i
	var out, stay []span
	for ; j < len(*m) && (*m)[j].start < end; j++ {
		s := (*m)[j]
		if s.start < start {
			left := s
			left.end = start
			stay = append(stay, left)
			s = s.from(start)
		}
		if s.end > end {
			stay = append(stay, s.from(end))
			s.end = end
		}
		out = append(out, s)
	}
	switch {
	case i == j:
	case i == 0 && len(stay) <= j: // what is copied in turn: nothing needs to move
		copy((*m)[j-len(stay):j], stay)
		*m = (*m)[j-len(stay):]
	default:
		*m = slices.Replace(*m, i, j, stay...)
	}
	return out
}

// move follows an mremap(2) of length bytes.
func (m *missing) move(from, to, length uint64) {
	moved := m.cut(from, from+length)
	m.cut(to, to+length)
	for i := range moved {
		moved[i].end = moved[i].end - from + to
		moved[i].start = moved[i].start - from + to
	}
	*m = slices.Insert(*m, m.after(to), moved...)
}

// fork is what a fork lacks.
func (m missing) fork() missing {
	child := make(missing, 0, len(m))
	for _, s := range m {
		if !s.wipe {
			child = append(child, s)
		}
	}
	return child
}

// bytes is how much is missing.
func (m missing) bytes() (n int64) {
	for _, s := range m {
		n += int64(s.end - s.start)
	}
	return n
}
