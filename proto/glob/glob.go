package glob

import "unicode/utf8"

// Match reports whether name as a whole fits the pattern. It takes time in
// proportion to the product of both lengths at most, and no memory.
func Match(pattern, name string) bool {
	p, n := 0, 0
	star, from := -1, 0 // the last *, and where in name its text ends for now
	for n < len(name) {
		_, size := utf8.DecodeRuneInString(name[n:])
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, from = p, n
			p++
		case p < len(pattern) && pattern[p] == '?':
			p++
			n += size
		case p < len(pattern) && pattern[p] == name[n]:
			p++
			n++
		case star >= 0:
			_, size := utf8.DecodeRuneInString(name[from:])
			from += size
			p, n = star+1, from
		default:
			return false
		}
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}
