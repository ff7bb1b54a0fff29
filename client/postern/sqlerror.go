package main

import (
	"fmt"
	"strings"
	"unicode"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/rowfmt"
)

// statementError is what the database or the host's policy said of a statement,
// with its text.
type statementError struct {
	err  *proto.Error
	text string
}

func (e *statementError) Error() string { return e.err.Error() }
func (e *statementError) Unwrap() error { return e.err }

// render is the error as psql shows it: the message, the line of the text with a
// caret at the position, detail and hint; each ends with a line break.
func (e *statementError) render() string {
	var b strings.Builder
	state := e.err.SQL.GetSqlstate()
	text := e.err.Error()
	switch {
	case e.err.Code != proto.CodeSQL: // the host's word, not the database's
		fmt.Fprintf(&b, "%s\n", safe(text))
	case state == "":
		fmt.Fprintf(&b, "ERROR: %s\n", safe(text))
	default:
		fmt.Fprintf(&b, "ERROR %s: %s\n", safe(state), safe(bare(text, state)))
	}
	b.WriteString(pointAt(e.text, int(e.err.SQL.GetPosition())))
	if d := e.err.SQL.GetDetail(); d != "" {
		fmt.Fprintf(&b, "DETAIL:  %s\n", safe(d))
	}
	if h := e.err.SQL.GetHint(); h != "" {
		fmt.Fprintf(&b, "HINT:  %s\n", safe(h))
	}
	return b.String()
}

// bare is the database's own words in a message that, for those who see it
// alone, says around them who spoke, the SQLSTATE and the position.
func bare(message, state string) string {
	if i := strings.LastIndex(message, " (SQLSTATE "+state); i > 0 && strings.HasSuffix(message, ")") {
		message = message[:i]
	}
	return strings.TrimPrefix(message, "the database refused the statement: ")
}

const (
	// excerptBefore and excerptAfter bound what is shown of a long line around
	// the position, in characters.
	excerptBefore = 50
	excerptAfter  = 30
)

// pointAt is the line of text that holds the position (1-based, in characters)
// and a caret below it; empty if the position is not in the text.
func pointAt(text string, position int) string {
	runes := []rune(text)
	at := position - 1
	if at < 0 || at > len(runes) || len(runes) == 0 {
		return ""
	}
	if at == len(runes) { // "at end of input"
		for at > 0 && unicode.IsSpace(runes[at-1]) {
			at--
		}
	}
	line, start := 1, 0
	for i, r := range runes[:at] {
		if r == '\n' {
			line++
			start = i + 1
		}
	}
	end := start
	for end < len(runes) && runes[end] != '\n' {
		end++
	}
	prefix := fmt.Sprintf("LINE %d: ", line)
	before, after := runes[start:at], runes[at:max(at, end)]
	if len(before) > excerptBefore {
		before = before[len(before)-excerptBefore:]
		prefix += "..."
	}
	suffix := ""
	if len(after) > excerptAfter {
		after = after[:excerptAfter]
		suffix = "..."
	}
	left, cells := rowfmt.Safe(flat(before))
	right, _ := rowfmt.Safe(flat(after))
	shown := strings.TrimRight(prefix+left+right+suffix, " ")
	return shown + "\n" + strings.Repeat(" ", len(prefix)+cells) + "^\n"
}

// flat has a blank for each white-space character, so that the caret's place
// holds.
func flat(runes []rune) string {
	out := make([]rune, len(runes))
	for i, r := range runes {
		if unicode.IsSpace(r) {
			r = ' '
		}
		out[i] = r
	}
	return string(out)
}
