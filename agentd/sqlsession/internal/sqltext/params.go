package sqltext

import (
	"fmt"
	"sort"
	"strings"
	"unicode/utf8"
)

// MaxParameters is how many values a statement can have: the protocol counts
// them in 16 bits.
const MaxParameters = 65535

// Value is a parameter as it was given.
type Value struct {
	Name string
	// Text is the value's text form; nil is NULL.
	Text *string
	// Type is the name of its type in the words of the engine; "" leaves the
	// type to the server.
	Type string
}

// Arg is a value that is bound to one or more of a statement's placeholders.
type Arg struct {
	// Name is the parameter's; the elements of a list have the same one.
	Name string
	// Text is the value's text form; nil is NULL.
	Text *string
	// Type is Value.Type.
	Type string
}

// Statement is a text whose placeholders have become the engine's own.
type Statement struct {
	// Text goes to the server.
	Text string
	// Args are the values to bind, in the order of the engine's placeholders.
	Args []Arg

	original string
	edits    []edit
}

// edit is one replacement, in characters from 0.
type edit struct {
	from, fromLen int // in the text that the user gave
	to, toLen     int // in Text
}

// Dialect is what differs between engines in how values get into a text.
type Dialect struct {
	// Placeholder is the n-th value's, from 1.
	Placeholder func(n int) string
	// Numbered tells whether a placeholder says which value it means, so that a
	// value which is used twice is sent once.
	Numbered bool
	// Identifier writes one name as an identifier in quotes. Its error says what
	// is wrong with the name.
	Identifier func(name string) (string, error)
	// EmptyIn and EmptyNotIn replace IN and NOT IN before a list without elements,
	// and EmptyList stands in its parentheses. An empty EmptyIn leaves the words.
	EmptyIn, EmptyNotIn, EmptyList string
	// Loose is for a text that is not run: a bound value need not be given. A
	// missing one is like NULL.
	Loose bool

	lex func(*scanner) kind
}

// PostgreSQL is the dialect of PostgreSQL's extended protocol.
var PostgreSQL = &Dialect{
	Placeholder: func(n int) string { return fmt.Sprintf("$%d", n) },
	Numbered:    true,
	Identifier:  postgresIdentifier,
	// The array takes the type of what stands on the left. In this form the
	// operator binds as tightly as IN.
	EmptyIn: "OPERATOR(=) ANY", EmptyNotIn: "OPERATOR(<>) ALL", EmptyList: "'{}'",
}

// Bind finds the placeholders of a text: {{name}} and :name, which are bound
// values, {{name|list}}, which stands alone in the parentheses after IN and
// becomes as many bound values as the list has, and {{name|identifier}}, the only
// one whose value goes into the text: as an identifier in quotes. A name that has
// no value, and a value that no placeholder uses, is an error. The server's own
// placeholders are refused.
//
// Within [ ] a colon may also be that of an array slice. There :name is none
// when an operand stands right before it (a[1:n]), and elsewhere only if there
// is a value of that name. {{name}} is always a placeholder.
func (d *Dialect) Bind(text string, values []Value) (*Statement, error) {
	b := binder{dialect: d, values: make(map[string]*given, len(values)), statement: &Statement{original: text}}
	for _, v := range values {
		if !isName(v.Name) {
			return nil, fmt.Errorf("%q is not a parameter's name: use letters, digits and _", v.Name)
		}
		if b.values[v.Name] != nil {
			return nil, fmt.Errorf("parameter %q is given twice", v.Name)
		}
		b.values[v.Name] = &given{Value: v}
	}
	b.scan.text, b.scan.lex = text, d.lex
	if err := b.bind(); err != nil {
		return nil, err
	}
	if n := len(b.statement.Args); n > MaxParameters {
		return nil, fmt.Errorf("the statement has %d parameters, more than %d", n, MaxParameters)
	}
	var unused []string
	for name, v := range b.values {
		if !v.used {
			unused = append(unused, name)
		}
	}
	if len(unused) > 0 {
		sort.Strings(unused)
		return nil, fmt.Errorf("the statement does not use parameter %q: write {{%s}} or :%s where its value belongs", unused[0], unused[0], unused[0])
	}
	b.statement.Text = string(b.out)
	return b.statement, nil
}

// given is a value and how it was used so far.
type given struct {
	Value
	used, missing bool
	// scalar and list are the placeholders that a numbered dialect repeats.
	scalar, list string
}

// binder is one Bind under way.
type binder struct {
	dialect   *Dialect
	values    map[string]*given
	statement *Statement
	scan      scanner
	out       []byte
	position  int // characters of the text so far
	written   int // characters of out so far
	brackets  int
	operand   bool // the token right before can end an expression
	last      [3]seen
}

// seen is one of the last tokens that are not white space, the newest first.
type seen struct {
	word          string // in upper case; or a symbol
	position      int    // characters of the text before it
	start, end    int    // its bytes in out
	written, size int    // characters of out before it, and its own
}

func (b *binder) bind() error {
	for {
		t, ok := b.scan.next()
		if !ok {
			return nil
		}
		name, form := "", ""
		switch t.kind {
		case native:
			return fmt.Errorf("position %d: %s is not supported: write {{name}} or :name and give a value for it", b.position+1, t.text)
		case symbol:
			switch t.text {
			case "[":
				b.brackets++
			case "]":
				b.brackets = max(0, b.brackets-1)
			}
		case brace:
			name, form, _ = strings.Cut(t.text[2:len(t.text)-2], "|")
			name, form = strings.TrimSpace(name), strings.TrimSpace(form)
		case variable:
			if name = t.text[1:]; b.brackets > 0 && (b.operand || b.values[name] == nil || b.values[name].missing) {
				name = ""
			}
		}
		b.operand = t.kind != space && (t.kind != symbol || t.text == ")" || t.text == "]")
		if name == "" {
			b.keep(t)
			continue
		}
		v := b.values[name]
		if v == nil && form == "" && b.dialect.Loose {
			v = &given{Value: Value{Name: name}, missing: true}
			b.values[name] = v
		}
		if v == nil {
			return fmt.Errorf("position %d: no value is given for parameter %q", b.position+1, name)
		}
		v.used = true
		var (
			replacement string
			err         error
		)
		switch form {
		case "":
			replacement = b.scalar(v)
		case "identifier":
			if v.Text == nil {
				return fmt.Errorf("position %d: parameter %q is NULL, which is no identifier", b.position+1, name)
			}
			if replacement, err = b.dialect.identifiers(*v.Text); err != nil {
				return fmt.Errorf("position %d: parameter %q: %w", b.position+1, name, err)
			}
		case "list":
			if replacement, err = b.list(v); err != nil {
				return fmt.Errorf("position %d: parameter %q: %w", b.position+1, name, err)
			}
		default:
			return fmt.Errorf("position %d: %s: there is no form %q: use identifier or list, or none for a value", b.position+1, t.text, form)
		}
		b.replace(t, b.apart(replacement))
	}
}

// keep copies a token.
func (b *binder) keep(t token) {
	length := utf8.RuneCountInString(t.text)
	if t.kind != space {
		b.note(seen{strings.ToUpper(t.text), b.position, len(b.out), len(b.out) + len(t.text), b.written, length}, t.kind)
	}
	b.out = append(b.out, t.text...)
	b.position += length
	b.written += length
}

func (b *binder) note(s seen, k kind) {
	if k != word && k != symbol {
		s.word = "" // "IN" in quotes is no keyword
	}
	b.last[2], b.last[1], b.last[0] = b.last[1], b.last[0], s
}

// replace writes what stands for a placeholder.
func (b *binder) replace(t token, replacement string) {
	length, size := utf8.RuneCountInString(t.text), utf8.RuneCountInString(replacement)
	b.statement.edits = append(b.statement.edits, edit{b.position, length, b.written, size})
	b.note(seen{"", b.position, len(b.out), len(b.out) + len(replacement), b.written, size}, t.kind)
	b.out = append(b.out, replacement...)
	b.position += length
	b.written += size
}

// apart puts spaces around a replacement where it would join with what stands
// beside it to another token: $1 with a digit, a$1, U&"...", "a""b".
func (b *binder) apart(replacement string) string {
	if n := len(b.out); n > 0 && joins(b.out[n-1]) {
		replacement = " " + replacement
	}
	if joins(b.scan.peek(0)) {
		replacement += " "
	}
	return replacement
}

// joins tells whether a character may make one token with a placeholder or an
// identifier in quotes beside it.
func joins(c byte) bool { return isWord(c) || c == '"' || c == '`' || c == '&' }

// scalar is the placeholder of one value.
func (b *binder) scalar(v *given) string {
	if v.scalar == "" || !b.dialect.Numbered {
		v.scalar = b.add(Arg{v.Name, v.Text, v.Type})
	}
	return v.scalar
}

func (b *binder) add(a Arg) string {
	b.statement.Args = append(b.statement.Args, a)
	return b.dialect.Placeholder(len(b.statement.Args))
}

// list is the placeholders of a list's elements, with commas between.
func (b *binder) list(v *given) (string, error) {
	if !b.aloneAfterIn() {
		return "", fmt.Errorf("a list stands alone in the parentheses after IN: write IN ({{%s|list}})", v.Name)
	}
	elements, err := listElements(v.Text)
	if err != nil {
		return "", err
	}
	if len(elements) == 0 {
		b.emptyIn()
		return b.dialect.EmptyList, nil
	}
	if v.list != "" && b.dialect.Numbered {
		return v.list, nil
	}
	var out strings.Builder
	for i, e := range elements {
		if i > 0 {
			out.WriteString(", ")
		}
		out.WriteString(b.add(Arg{v.Name, e, v.Type}))
	}
	v.list = out.String()
	return v.list, nil
}

// aloneAfterIn tells whether IN ( stands before the token at hand, and ) behind.
func (b *binder) aloneAfterIn() bool {
	if b.last[0].word != "(" || b.last[1].word != "IN" {
		return false
	}
	ahead := b.scan
	for {
		t, ok := ahead.next()
		if !ok || t.kind != space {
			return ok && t.text == ")"
		}
	}
}

// emptyIn rewrites IN, or NOT IN, before a list without elements.
func (b *binder) emptyIn() {
	if b.dialect.EmptyIn == "" {
		return
	}
	in, words := b.last[1], b.dialect.EmptyIn
	first := in
	if b.last[2].word == "NOT" {
		first, words = b.last[2], b.dialect.EmptyNotIn
	}
	// A comment between the two words stays between them and the parenthesis.
	tail := string(b.out[in.end:])
	if first != in {
		tail = string(b.out[first.end:in.start]) + tail
	}
	if first.start > 0 && joins(b.out[first.start-1]) {
		words = " " + words
	}
	b.out = append(append(b.out[:first.start], words...), tail...)
	size := utf8.RuneCountInString(words)
	from := in.position + in.size - first.position
	gap := utf8.RuneCountInString(tail) - (b.position - in.position - in.size)
	// What stood between the words counts as part of the replacement.
	b.statement.edits = append(b.statement.edits, edit{first.position, from, first.written, size + gap})
	b.written = first.written + size + utf8.RuneCountInString(tail)
}

// Position turns the server's 1-based position in Text into that in the
// user's text; both count characters. 0 stays 0.
func (s *Statement) Position(position int) int {
	if position <= 0 {
		return 0
	}
	at, shift := position-1, 0
	for _, e := range s.edits {
		if at < e.to {
			break
		}
		if at < e.to+e.toLen {
			return e.from + 1
		}
		shift += e.fromLen - e.toLen
	}
	at += shift
	return min(at+1, utf8.RuneCountInString(s.original)+1)
}
