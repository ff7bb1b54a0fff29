package pagestore

import "maps"

// location is where a chunk is: pack number (in orgStore.packs order) and chunk.
type location struct {
	pack  uint32
	chunk uint32
}

// index finds stored chunks by hash. It holds at most limit chunks, about 40 bytes
// each; packs that no longer fit are forgotten, oldest use first, which costs nothing
// but finding their chunks. Guarded by orgStore.mu.
type index struct {
	limit  int
	chunks map[chunkHash]location
	loaded map[uint32]uint64 // packs whose hashes are in, and when they were last useful
	clock  uint64
}

func newIndex(limit int) *index {
	return &index{limit: limit, chunks: map[chunkHash]location{}, loaded: map[uint32]uint64{}}
}

func (x *index) has(pack uint32) bool { _, ok := x.loaded[pack]; return ok }

func (x *index) touch(pack uint32) {
	x.clock++
	x.loaded[pack] = x.clock
}

// add takes in a pack's chunks.
func (x *index) add(pack uint32, hashes []chunkHash) {
	if len(hashes) > x.limit {
		return
	}
	if len(x.chunks)+len(hashes) > x.limit {
		x.shrink(x.limit - len(hashes))
	}
	for i, h := range hashes {
		if h == deadChunk {
			continue
		}
		if _, known := x.chunks[h]; !known {
			x.chunks[h] = location{pack, uint32(i)}
		}
	}
	x.touch(pack)
}

// shrink forgets the packs least recently used until a quarter below want is left:
// each round looks at every chunk, so it is worth its while.
func (x *index) shrink(want int) {
	want -= want / 4
	count := map[uint32]int{}
	for _, l := range x.chunks {
		count[l.pack]++
	}
	forget := map[uint32]bool{}
	for left := len(x.chunks); left > want && len(forget) < len(x.loaded); {
		oldest, at := uint32(0), uint64(0)
		for p, t := range x.loaded {
			if !forget[p] && (at == 0 || t < at) {
				oldest, at = p, t
			}
		}
		forget[oldest] = true
		left -= count[oldest]
	}
	x.drop(func(l location) bool { return forget[l.pack] })
	for p := range forget {
		delete(x.loaded, p)
	}
}

// drop forgets chunks.
func (x *index) drop(gone func(location) bool) {
	maps.DeleteFunc(x.chunks, func(_ chunkHash, l location) bool { return gone(l) })
}
