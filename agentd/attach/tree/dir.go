package tree

import "sort"

// firstCookie is the position of a directory's first own name; 1 and 2 are "." and "..".
const firstCookie = 3

// Dir is what is in a directory. Names keep their place while others come and go, so
// that somebody who lists it sees each name that stays exactly once.
type Dir struct {
	// Loaded: every name is known.
	Loaded bool

	entries        []Entry // in order of Cookie; ID 0: gone
	index          map[string]int32
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
	i, ok := d.index[name]
	if !ok {
		return 0
	}
	return d.entries[i].ID
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
	if i, ok := d.index[name]; ok {
		old = d.entries[i].ID
		d.entries[i].ID = id
		return old
	}
	if d.index == nil {
		d.index = map[string]int32{}
	}
	if cookie < d.next {
		cookie = d.next
	}
	d.next = cookie + 1
	d.index[name] = int32(len(d.entries))
	d.entries = append(d.entries, Entry{Cookie: cookie, ID: id, Name: name})
	return 0
}

func (d *Dir) remove(name string) (old uint64) {
	i, ok := d.index[name]
	if !ok {
		return 0
	}
	old = d.entries[i].ID
	d.entries[i] = Entry{Cookie: d.entries[i].Cookie}
	delete(d.index, name)
	d.gone++
	if d.gone > 32 && d.gone > len(d.entries)/2 {
		d.compact()
	}
	return old
}

func (d *Dir) compact() {
	kept := make([]Entry, 0, len(d.entries)-d.gone)
	index := make(map[string]int32, len(d.entries)-d.gone)
	for _, e := range d.entries {
		if e.ID != 0 {
			index[e.Name] = int32(len(kept))
			kept = append(kept, e)
		}
	}
	d.entries, d.index, d.gone = kept, index, 0
}
