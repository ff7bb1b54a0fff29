package sqltext

import "strings"

// Complexity is how much work a text is for a parser, by its tokens.
type Complexity struct {
	// Tokens counts those that are no white space and no comment. Each can make
	// the tree of the text at most about one level deeper.
	Tokens int
	// Depth is an estimate of the levels of the tree: brackets, CASE, and
	// operators in a row. It is mostly too high, and was never seen to be less
	// than a third of what it is.
	Depth int
	// Comments is how deep comments nest.
	Comments int
}

// perBracket is what a bracket counts in Complexity.Depth: (SELECT ...) makes
// three levels.
const perBracket = 3

// level is one bracket that is open, or one CASE.
type level struct {
	open byte // ( or [, or c for CASE; 0 is the text itself
	// soft counts operators since the last AND, OR or the like; hard those
	// that go on behind them, as in a BETWEEN 1 AND 2 IS NULL BETWEEN ...
	soft, hard int
}

// resets are the words at which another expression starts; those with false
// leave what is hard.
var resets = map[string]bool{
	"and": false, "or": false, "on": false, "when": false, "then": false, "else": false, "using": false,
	"select": true, "from": true, "where": true, "group": true, "having": true, "order": true, "limit": true, "values": true, "set": true,
}

// hard are the words that put a level on top of all that stands before them.
var hard = map[string]bool{
	"join": true, "between": true, "is": true, "isnull": true, "notnull": true, "in": true, "like": true, "ilike": true, "similar": true,
	"collate": true, "at": true, "not": true, "overlaps": true, "operator": true, "tablesample": true,
}

// Measure returns the complexity of a text in one pass, in memory bounded by
// its brackets.
func Measure(text string) Complexity {
	var (
		c      Complexity
		scan   = scanner{text: text}
		levels = []level{{}}
		above  int  // what the levels under the top count
		label  bool // behind a point or AS any word is a name
	)
	push := func(open byte) {
		top := levels[len(levels)-1]
		above += top.soft + top.hard + perBracket
		levels = append(levels, level{open: open})
	}
	pop := func(open byte) {
		if levels[len(levels)-1].open != open {
			return
		}
		levels = levels[:len(levels)-1]
		top := levels[len(levels)-1]
		above -= top.soft + top.hard + perBracket
	}
	for {
		t, ok := scan.next()
		if !ok {
			return c
		}
		if t.kind == space {
			c.Comments = max(c.Comments, commentDepth(t.text))
			continue
		}
		c.Tokens++
		top := &levels[len(levels)-1]
		named := label
		label = false
		switch t.kind {
		case word:
			if named || len(t.text) > 11 {
				break
			}
			name := strings.ToLower(t.text)
			switch all, reset := resets[name]; {
			case name == "case":
				push('c')
			case name == "end":
				pop('c')
			case name == "as":
				label = true
			case reset:
				top.soft = 0
				if all {
					top.hard = 0
				}
			case hard[name]:
				top.hard++
			}
		case symbol:
			switch t.text {
			case "(", "[":
				push(t.text[0])
			case ")":
				pop('(')
			case "]":
				pop('[')
			case ",", ";":
				top.soft, top.hard = 0, 0
			case ".":
				label = true
			default:
				top.soft++
			}
		}
		top = &levels[len(levels)-1]
		c.Depth = max(c.Depth, above+top.soft+top.hard)
	}
}

// commentDepth is how deep a comment nests; 0 for white space.
func commentDepth(text string) int {
	if !strings.HasPrefix(text, "/*") {
		return 0
	}
	depth, most := 0, 0
	for i := 0; i+1 < len(text); i++ {
		switch text[i : i+2] {
		case "/*":
			depth++
			most = max(most, depth)
			i++
		case "*/":
			depth--
			i++
		}
	}
	return most
}
