package lazy

import (
	"math/rand/v2"
	"testing"
)

// TestRangesAreWhatAMapOfPagesSays compares with the plainest thing that does the same: a
// map from page to page of the image.
func TestRangesAreWhatAMapOfPagesSays(t *testing.T) {
	const page, pages = 4096, 64
	rng := rand.New(rand.NewPCG(1, 2))
	for round := range 300 {
		var m missing
		model := map[uint64]int64{}
		off := int64(0)
		for at := uint64(0); at < pages; {
			n := 1 + rng.Uint64N(6)
			if rng.IntN(3) > 0 {
				m = append(m, span{start: at * page, end: (at + n) * page, off: off, wipe: rng.IntN(8) == 0})
				for i := range n {
					model[at+i] = off + int64(i)*page
				}
				off += int64(n) * page
			}
			at += n
		}
		for step := range 60 {
			at, n := rng.Uint64N(pages), 1+rng.Uint64N(8)
			switch rng.IntN(4) {
			case 0: // from the front, as what is copied in turn
				if len(m) == 0 {
					break
				}
				at, n = m[0].start/page, 1
				fallthrough
			case 1:
				m.cut(at*page, (at+n)*page)
				for i := range n {
					delete(model, at+i)
				}
			case 2:
				to := pages + rng.Uint64N(pages)
				m.move(at*page, to*page, n*page)
				moved := map[uint64]int64{}
				for i := range n {
					if o, ok := model[at+i]; ok {
						moved[to+i] = o
						delete(model, at+i)
					}
				}
				for i := range n {
					delete(model, to+i)
				}
				for p, o := range moved {
					model[p] = o
				}
			case 3:
				for _, s := range m {
					if s.wipe {
						for p := s.start / page; p < s.end/page; p++ {
							delete(model, p)
						}
					}
				}
				m = m.fork()
			}
			last := uint64(0)
			for _, s := range m {
				if s.start < last || s.start >= s.end {
					t.Fatalf("round %d, step %d: in disorder: %v", round, step, m)
				}
				last = s.end
			}
			for p := range uint64(3 * pages) {
				s, ok := m.at(p * page)
				o, want := model[p]
				if ok != want || ok && s.off != o {
					t.Fatalf("round %d, step %d: page %d is at %d, %v; want %d, %v", round, step, p, s.off, ok, o, want)
				}
			}
			if m.bytes() != int64(len(model))*page {
				t.Fatalf("round %d: %d bytes are missing, want %d pages", round, m.bytes(), len(model))
			}
		}
	}
}
