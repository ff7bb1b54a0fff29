package tree

import (
	"hash/maphash"
	"sort"
)

// firstCookie is the position of a directory's first own name; 1 and 2 are "." and "..".
const firstCookie = 3

// Dir is what is in a directory. Names keep their place while others come and go, so
// that somebody who lists it sees each name that stays exactly once.
type Dir struct {
	// Loaded: every name is known.
	Loaded bool

	entries []Entry // in order of Cookie; ID 0: gone
	// index finds entries by their names' hashes: each slot is a place in entries plus 1, 0 is free. A
	// name that is not in its slot is in one of those behind it. The slot of an entry that is gone
	// stays taken until the next rebuild. Nil: there are few entries.
	index          []int32
	gone           int
	next           uint64
	subdirectories uint32
}

// Entry is a name in a directory.
type Entry struct {
	Cookie uint64 // its place, at least 3
	ID     uint64
	Name   string
}

func newDir() *Dir { return &Dir{next: firstCookie} }

// Len is the number of names.
func (d *Dir) Len() int { return len(d.entries) - d.gone }

// Lookup finds a name, 0 if it is not known.
func (d *Dir) Lookup(name string) uint64 {
	if i := d.find(name); i >= 0 {
		return d.entries[i].ID
	}
	return 0
}

// few is how many entries a Dir has without an index.
const few = 8

var seed = maphash.MakeSeed()

// find is the place of a name in entries, -1 if it is not there.
func (d *Dir) find(name string) int {
	if d.index == nil {
		for i, e := range d.entries {
			if e.ID != 0 && e.Name == name {
				return i
			}
		}
		return -1
	}
	mask := uint64(len(d.index) - 1)
	for h := maphash.String(seed, name) & mask; ; h = (h + 1) & mask {
		i := d.index[h] - 1
		if i < 0 {
			return -1
		}
		if e := &d.entries[i]; e.ID != 0 && e.Name == name {
			return int(i)
		}
	}
}

// indexed puts the last of entries into the index, which it makes larger if needed.
func (d *Dir) indexed() {
	n := len(d.entries)
	switch {
	case n <= few:
		return
	case n > len(d.index)/4*3:
		d.reindex()
		return
	}
	d.slot(n - 1)
}

func (d *Dir) slot(i int) {
	mask := uint64(len(d.index) - 1)
	h := maphash.String(seed, d.entries[i].Name) & mask
	for d.index[h] != 0 {
		h = (h + 1) & mask
	}
	d.index[h] = int32(i + 1)
}

// reindex makes the index anew, for half as many entries again.
func (d *Dir) reindex() {
	if len(d.entries) <= few {
		d.index = nil
		return
	}
	size := 4 * few
	for size/2 < len(d.entries) {
		size *= 2
	}
	d.index = make([]int32, size)
	for i, e := range d.entries {
		if e.ID != 0 {
			d.slot(i)
		}
	}
}

// From calls each for the names behind a cookie, in order, until it returns false.
func (d *Dir) From(cookie uint64, each func(Entry) bool) {
	i := sort.Search(len(d.entries), func(i int) bool { return d.entries[i].Cookie > cookie })
	for ; i < len(d.entries); i++ {
		if d.entries[i].ID != 0 && !each(d.entries[i]) {
			return
		}
	}
}

func (d *Dir) set(name string, id, cookie uint64) (old uint64) {
	if i := d.find(name); i >= 0 {
		old = d.entries[i].ID
		d.entries[i].ID = id
		return old
	}
	if cookie < d.next {
		cookie = d.next
	}
	d.next = cookie + 1
	d.entries = append(d.entries, Entry{Cookie: cookie, ID: id, Name: name})
	d.indexed()
	return 0
}

func (d *Dir) remove(name string) (old uint64) {
	i := d.find(name)
	if i < 0 {
		return 0
	}
	old = d.entries[i].ID
	d.entries[i] = Entry{Cookie: d.entries[i].Cookie}
	d.gone++
	if d.gone > 32 && d.gone > len(d.entries)/2 {
		d.compact()
	}
	return old
}

func (d *Dir) compact() {
	kept := make([]Entry, 0, len(d.entries)-d.gone)
	for _, e := range d.entries {
		if e.ID != 0 {
			kept = append(kept, e)
		}
	}
	d.entries, d.gone = kept, 0
	d.reindex()
}
