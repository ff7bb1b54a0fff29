package sqltext

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestBind(t *testing.T) {
	tests := []struct {
		name, text string
		given      string
		want, err  string
	}{
		{name: "none", text: "select 1", want: "select 1"},
		{name: "both forms", text: "select {{a}}, :b, {{ a }}", given: "a b", want: "select $1, $2, $1"},
		{name: "cast", text: "select :a::int, x::text", given: "a", want: "select $1::int, x::text"},
		{name: "assignment", text: "select f(x := :x, y:=1)", given: "x", want: "select f(x := $1, y:=1)"},
		{name: "in quotes", text: `select ':a', "{{a}}", E'\':a', e'a\\', :a`, given: "a", want: `select ':a', "{{a}}", E'\':a', e'a\\', $1`},
		{name: "backslash in a plain string", text: `select '\', :a, '`, given: "a", want: `select '\', $1, '`},
		{name: "dollar quotes", text: "select $$:a$$, $t$ $$ :a $t$, :a", given: "a", want: "select $$:a$$, $t$ $$ :a $t$, $1"},
		{name: "comments", text: "select /* :a /* {{a}} */ :a */ :a -- :a\n, :a", given: "a", want: "select /* :a /* {{a}} */ :a */ $1 -- :a\n, $1"},
		{name: "slice", text: "select a[1:n], b[:n], c[i::int:j]", want: "select a[1:n], b[:n], c[i::int:j]"},
		{name: "slice and values", text: "select a[1:n], ARRAY[:n, x + :n], a[{{n}}:{{n}}]", given: "n", want: "select a[1:n], ARRAY[$1, x + $1], a[$1:$1]"},
		{name: "array literal in quotes", text: "select '{{1,2},{3,4}}'::int[]", want: "select '{{1,2},{3,4}}'::int[]"},
		{name: "braces that are none", text: "select {{1,2}}", want: "select {{1,2}}"},
		{name: "word glued to it", text: "select a:x", given: "x", want: "select a $1"},
		{name: "digit behind it", text: "select {{x}}1", given: "x", want: "select $1 1"},
		{name: "unicode", text: "select 'é😀', :x", given: "x", want: "select 'é😀', $1"},
		{name: "string continued", text: "select E'\\''\n'\\' :a', :a", given: "a", want: "select E'\\''\n'\\' :a', $1"},
		{name: "identifier with dollars", text: "select a$1, a$$b", want: "select a$1, a$$b"},
		{name: "unknown", text: "select 'é', :nope", err: `position 13: no value is given for parameter "nope"`},
		{name: "unused", text: "select 1", given: "b a", err: `does not use parameter "a"`},
		{name: "twice", text: "select :a", given: "a a", err: "given twice"},
		{name: "bad name", text: "select 1", given: "a-b", err: "is not a parameter's name"},
		{name: "native", text: "select $1", err: "$1 is not supported"},
		{name: "open quote", text: "select ':a", want: "select ':a"},
		{name: "open comment", text: "select /* :a", want: "select /* :a"},
		{name: "open dollar", text: "select $a$ :a", want: "select $a$ :a"},
		{name: "escape at the end", text: `select E'\`, want: `select E'\`},
		{name: "U&", text: `select U&':a', u&":a", :a`, given: "a", want: `select U&':a', u&":a", $1`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := PostgreSQL.Bind(test.text, values(test.given))
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Fatalf("got %v, want an error with %q", err, test.err)
				}
				return
			}
			if err != nil || got.Text != test.want {
				t.Fatalf("got %q, %v, want %q", got.Text, err, test.want)
			}
		})
	}
}

// values are parameters with these names; the value of a is [], that of b is [1,"x"].
func values(names string) []Value {
	var list []Value
	for _, name := range strings.Fields(names) {
		text := map[string]string{"a": "[]", "b": `[1,"x"]`}[name]
		list = append(list, Value{Name: name, Text: &text})
	}
	return list
}

func TestPosition(t *testing.T) {
	const text = "select {{long_name}}, 'é', :b, oops"
	s, err := PostgreSQL.Bind(text, values("long_name b"))
	if err != nil {
		t.Fatal(err)
	}
	for _, mark := range []string{"select", "'é'", "oops"} {
		runes := func(text, mark string) int { return utf8.RuneCountInString(text[:strings.Index(text, mark)]) + 1 }
		if got, want := s.Position(runes(s.Text, mark)), runes(text, mark); got != want {
			t.Errorf("%s: got %d, want %d", mark, got, want)
		}
	}
	if got := s.Position(strings.Index(s.Text, "$1") + 2); got != 8 {
		t.Errorf("inside the first placeholder: got %d, want 8", got)
	}
	if got := s.Position(0); got != 0 {
		t.Errorf("no position: got %d, want 0", got)
	}
}

func TestFirstKeyword(t *testing.T) {
	tests := map[string]string{
		"select 1": "select", " /* a /* b */ */ -- c\n;; COPY x": "copy", "((VALUES (1)))": "values", "": "", " ; -- x": "", "'x'": "?",
		"commit;": "commit", "\"select\"": "?", "SELECT": "select",
	}
	for text, want := range tests {
		if got := FirstKeyword(text); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func FuzzBind(f *testing.F) {
	for _, text := range []string{
		"select {{a}}, :b", "select E'\\'', $$x$$ /* /* */ */ -- x\n", "a[1:n]", "U&\"x\"", "$a$ $a$", ":a::int := {{ a }}", "1.5e-3..0x1fg é",
	} {
		f.Add(text)
	}
	f.Add("select * from {{a|identifier}} where x not /* é */ in /* */ ( {{b|list}} ) or y in ({{b | list}})")
	f.Fuzz(func(t *testing.T, text string) {
		if !utf8.ValidString(text) || len(text) > 2000 {
			return // the caller refuses the first; the second takes quadratic time below
		}
		scan := scanner{text: text}
		var joined strings.Builder
		for {
			token, ok := scan.next()
			if !ok {
				break
			}
			if token.text == "" {
				t.Fatal("an empty token")
			}
			joined.WriteString(token.text)
		}
		if joined.String() != text {
			t.Fatalf("the tokens join to %q, want %q", joined.String(), text)
		}
		FirstKeyword(text)
		Measure(text)
		s, err := PostgreSQL.Bind(text, values("a b"))
		if err != nil {
			s, err = PostgreSQL.Bind(text, nil)
		}
		if err != nil {
			return
		}
		last := 0
		for at := 1; at <= utf8.RuneCountInString(s.Text); at++ {
			got := s.Position(at)
			if got < last || got > utf8.RuneCountInString(text)+1 {
				t.Fatalf("position %d of %q became %d of %q after %d", at, s.Text, got, text, last)
			}
			last = got
		}
		// What has been bound has nothing left to bind.
		if !strings.Contains(text, "|") && len(s.Args) == 0 && s.Text != text {
			t.Fatalf("got %q, want it unchanged: %q", s.Text, text)
		}
	})
}
