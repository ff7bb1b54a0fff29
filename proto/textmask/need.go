package textmask

import (
	"math"
	"regexp/syntax"
)

// need is what every match has: at least run bytes in a row that are all in
// set. A run of 0 says nothing.
type need struct {
	set [256]bool
	run int
}

// in tells whether text has it.
func (n *need) in(text []byte) bool {
	if n.run == 0 {
		return true
	}
	// Look where a run that begins here would end; a byte out of the set there
	// rules out all starts up to it.
	for i := n.run - 1; i < len(text); {
		j := i
		for j > i-n.run && n.set[text[j]] {
			j--
		}
		if j == i-n.run {
			return true
		}
		i = j + n.run
	}
	return false
}

// byteSet is a set of bytes.
type byteSet [4]uint64

func (s *byteSet) add(b byte) { s[b/64] |= 1 << (b % 64) }
func (s *byteSet) union(o byteSet) {
	s[0], s[1], s[2], s[3] = s[0]|o[0], s[1]|o[1], s[2]|o[2], s[3]|o[3]
}

func (s *byteSet) addHigh() { s[2], s[3] = math.MaxUint64, math.MaxUint64 }

func (s *byteSet) addRange(lo, hi rune) {
	for r := lo; r <= min(hi, 127); r++ {
		s.add(byte(r))
	}
	if hi > 127 {
		s.addHigh()
	}
}

// part is what is known of a piece of a pattern: all bytes that it takes are in
// set, and they are at least min; and a run that it has somewhere inside.
type part struct {
	set  byteSet
	min  int
	best run
}

type run struct {
	set byteSet
	n   int
}

// score is how rare a run is in texts as they are: the bits that it tells. A
// long run of letters tells little, one @ much.
func (r run) score() float64 {
	if r.n == 0 {
		return 0
	}
	share := 0.0
	for b := range 256 {
		if r.set[b/64]&(1<<(b%64)) == 0 {
			continue
		}
		switch c := byte(b); {
		case c >= 'a' && c <= 'z', c == ' ':
			share += 0.03
		case c >= '0' && c <= '9':
			share += 0.01
		case c >= 'A' && c <= 'Z':
			share += 0.004
		default:
			share += 0.0005
		}
	}
	return float64(min(r.n, 16)) * -math.Log2(min(1, share))
}

func better(a, b run) run {
	if b.score() > a.score() {
		return b
	}
	return a
}

// needOf finds what matches of a pattern have.
func needOf(pattern string) need {
	re, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return need{}
	}
	p := look(re.Simplify(), 0)
	var n need
	if p.best.score() < 1 {
		return n
	}
	n.run = p.best.n
	for b := range 256 {
		n.set[b] = p.best.set[b/64]&(1<<(b%64)) != 0
	}
	return n
}

// maxMin keeps sums small.
const maxMin = 1 << 12

func look(re *syntax.Regexp, depth int) part {
	var p part
	all := byteSet{math.MaxUint64, math.MaxUint64, math.MaxUint64, math.MaxUint64}
	if depth > 100 {
		p.set = all
		return p
	}
	switch re.Op {
	case syntax.OpNoMatch, syntax.OpEmptyMatch, syntax.OpBeginLine, syntax.OpEndLine, syntax.OpBeginText, syntax.OpEndText,
		syntax.OpWordBoundary, syntax.OpNoWordBoundary:
		return p
	case syntax.OpLiteral:
		var whole part
		for _, r := range re.Rune {
			var one part
			one.set.addRange(r, r)
			if re.Flags&syntax.FoldCase != 0 {
				one.set.addHigh() // K is also the sign of Kelvin
				if r < 128 {
					lower, upper := r|0x20, r&^0x20
					if lower >= 'a' && lower <= 'z' {
						one.set.addRange(lower, lower)
						one.set.addRange(upper, upper)
					}
				} else {
					one.set = all
				}
			}
			one.min = 1
			whole = join([]part{whole, one})
		}
		return whole
	case syntax.OpCharClass:
		for i := 0; i+1 < len(re.Rune); i += 2 {
			p.set.addRange(re.Rune[i], re.Rune[i+1])
		}
		p.min = 1
	case syntax.OpAnyChar, syntax.OpAnyCharNotNL:
		p.set, p.min = all, 1
	case syntax.OpCapture:
		return look(re.Sub[0], depth+1)
	case syntax.OpStar, syntax.OpQuest:
		p.set = look(re.Sub[0], depth+1).set
		return p
	case syntax.OpPlus:
		return look(re.Sub[0], depth+1)
	case syntax.OpConcat:
		var parts []part
		for _, sub := range re.Sub {
			parts = append(parts, look(sub, depth+1))
		}
		return join(parts)
	case syntax.OpAlternate:
		for i, sub := range re.Sub {
			q := look(sub, depth+1)
			p.set.union(q.set)
			if i == 0 {
				p.min, p.best = q.min, q.best
				continue
			}
			p.min = min(p.min, q.min)
			p.best.set.union(q.best.set)
			p.best.n = min(p.best.n, q.best.n)
		}
	default:
		p.set = all
		return p
	}
	p.best = better(p.best, run{p.set, p.min})
	return p
}

// join is for parts one behind the other.
func join(parts []part) part {
	var p part
	for i := range parts {
		p.set.union(parts[i].set)
		p.min = min(maxMin, p.min+parts[i].min)
		p.best = better(p.best, parts[i].best)
		var r run
		for j := i; j < len(parts) && j < i+64; j++ {
			r.set.union(parts[j].set)
			r.n = min(maxMin, r.n+parts[j].min)
			p.best = better(p.best, r)
		}
	}
	p.best = better(p.best, run{p.set, p.min})
	return p
}
