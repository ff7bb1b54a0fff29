package pgverb

import (
	"strings"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
)

// rest is the query behind the token that was read last.
func (r *reader) rest(kind Kind, name string) *Statement {
	t := r.tokens[r.at-1]
	start := t.Start + len(t.Text)
	return &Statement{Kind: kind, SQL: r.text, Name: name, Query: r.text[start:], Start: start}
}

func (r *reader) prepare() *Statement {
	r.next()
	if r.peek(0) == "transaction" && r.at+1 < len(r.tokens) && r.tokens[r.at+1].Kind == sqltext.Literal {
		r.refuse("two-phase commit is not supported")
	}
	name := r.own()
	if r.accept("(") {
		for depth := 1; depth > 0; {
			t := r.next()
			switch {
			case t.Text == "(":
				depth++
			case t.Text == ")":
				depth--
			case t.Kind == sqltext.Word, t.Kind == sqltext.Number, t.Kind == sqltext.Quoted && t.Text[0] == '"':
			case t.Kind == sqltext.Symbol && strings.Contains(",.[]%", t.Text):
			default:
				r.at--
				r.unexpected()
			}
		}
	}
	r.expect("as")
	return r.rest(Prepare, name)
}

// execute takes values alone as arguments: no expression that could call anything.
func (r *reader) execute() *Statement {
	r.next()
	name := r.own()
	var out strings.Builder
	out.WriteString("EXECUTE " + quote(name))
	if r.accept("(") {
		out.WriteString("(")
		for {
			r.value(&out)
			if r.accept(")") {
				break
			}
			r.expect(",")
			out.WriteString(", ")
		}
		out.WriteString(")")
	}
	r.end()
	return &Statement{Kind: Execute, SQL: out.String(), Name: name}
}

// value reads one constant, perhaps with a sign before it and a type's name before
// or behind it.
func (r *reader) value(out *strings.Builder) {
	if sign := r.acceptAny("-", "+"); sign != "" {
		out.WriteString(sign)
		if r.at >= len(r.tokens) || r.tokens[r.at].Kind != sqltext.Number {
			r.unexpected()
		}
	}
	t := r.next()
	switch {
	case t.Kind == sqltext.Number, t.Kind == sqltext.Literal:
		out.WriteString(t.Text)
	case t.Kind == sqltext.Word && r.at < len(r.tokens) && r.tokens[r.at].Kind == sqltext.Literal && constantTypes[strings.ToLower(t.Text)]:
		out.WriteString(t.Text + " " + r.next().Text)
	case t.Kind == sqltext.Word && (strings.EqualFold(t.Text, "null") || strings.EqualFold(t.Text, "true") || strings.EqualFold(t.Text, "false")):
		out.WriteString(t.Text)
	default:
		r.at--
		r.refuse("arguments of EXECUTE are constants here: write numbers, texts, NULL, TRUE or FALSE")
	}
	if r.accept("::") {
		kind := r.next()
		if kind.Kind != sqltext.Word || !constantTypes[strings.ToLower(kind.Text)] {
			r.at--
			r.refuse("arguments of EXECUTE are constants of the common types here")
		}
		out.WriteString("::" + kind.Text)
	}
}

// constantTypes are those that a constant may be cast to: their input functions
// are the server's own.
var constantTypes = set(`bool boolean bytea date decimal float4 float8 inet int int2 int4 int8 bigint integer interval json jsonb numeric real
	smallint text time timestamp timestamptz timetz uuid varchar`)

func set(words string) map[string]bool {
	m := make(map[string]bool)
	for _, w := range strings.Fields(words) {
		m[w] = true
	}
	return m
}

func (r *reader) deallocate() *Statement {
	r.next()
	if r.peek(0) == "prepare" && r.at+1 < len(r.tokens) {
		r.at++
	}
	if r.peek(0) == "all" {
		r.at++
		r.end()
		return &Statement{Kind: Deallocate, SQL: "DEALLOCATE ALL"}
	}
	name := r.own()
	r.end()
	return &Statement{Kind: Deallocate, SQL: "DEALLOCATE " + quote(name), Name: name}
}

func (r *reader) declare() *Statement {
	r.next()
	name := r.own()
	for r.acceptAny("asensitive", "insensitive", "binary", "scroll") != "" || r.accept("no", "scroll") {
		if strings.EqualFold(r.tokens[r.at-1].Text, "binary") {
			r.at--
			r.refuse("BINARY cursors are not supported")
		}
	}
	r.expect("cursor")
	if r.peek(0) == "with" {
		r.refuse("cursors WITH HOLD are not supported: fetch within the transaction")
	}
	r.accept("without", "hold")
	r.expect("for")
	return r.rest(Declare, name)
}

func (r *reader) fetch() *Statement {
	verb := strings.ToUpper(r.next().Text)
	kind := Fetch
	if verb == "MOVE" {
		kind = Move
	}
	var out []string
	direction := r.acceptAny("next", "prior", "first", "last", "absolute", "relative", "all", "forward", "backward")
	if direction != "" && r.at == len(r.tokens) { // a cursor of that name
		r.at--
		direction = ""
	}
	if direction != "" {
		out = append(out, strings.ToUpper(direction))
		if (direction == "forward" || direction == "backward") && r.accept("all") {
			out = append(out, "ALL")
		}
	}
	sign := r.acceptAny("-", "+")
	if r.at < len(r.tokens) && r.tokens[r.at].Kind == sqltext.Number {
		out = append(out, sign+r.next().Text)
	} else if sign != "" {
		r.unexpected()
	}
	if r.at+1 < len(r.tokens) {
		r.acceptAny("from", "in")
	}
	name := r.own()
	r.end()
	out = append(out, "FROM", quote(name))
	return &Statement{Kind: kind, SQL: verb + " " + strings.Join(out, " "), Name: name}
}

func (r *reader) close() *Statement {
	r.next()
	if r.peek(0) == "all" {
		r.at++
		r.end()
		return &Statement{Kind: Close, SQL: "CLOSE ALL"}
	}
	name := r.own()
	r.end()
	return &Statement{Kind: Close, SQL: "CLOSE " + quote(name), Name: name}
}

func (r *reader) discard() *Statement {
	r.next()
	what := r.acceptAny("all", "plans", "sequences", "temp", "temporary")
	if what == "" {
		r.unexpected()
	}
	r.end()
	if what == "temporary" {
		what = "temp"
	}
	return &Statement{Kind: Discard, SQL: "DISCARD " + strings.ToUpper(what), Name: what}
}
