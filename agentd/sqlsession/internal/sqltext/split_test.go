package sqltext

import (
	"slices"
	"strings"
	"testing"

	"github.com/postern-dev/postern/proto/sqlsplit"
	"github.com/postern-dev/postern/proto/sqlsplit/sqlsplittest"
)

// ours are the placeholders of a text as Bind finds them, if each name has a value.
func ours(lex func(*scanner) kind, text string) (names []string) {
	scan := scanner{text: text, lex: lex}
	brackets, operand := 0, false
	for {
		t, ok := scan.next()
		if !ok {
			break
		}
		name := ""
		switch t.kind {
		case symbol:
			switch t.text {
			case "[":
				brackets++
			case "]":
				brackets = max(0, brackets-1)
			}
		case brace:
			name, _, _ = strings.Cut(t.text[2:len(t.text)-2], "|")
			name = strings.TrimSpace(name)
		case variable:
			if brackets == 0 || !operand {
				name = t.text[1:]
			}
		}
		if name != "" {
			names = append(names, name)
		}
		operand = t.kind != space && (t.kind != symbol || t.text == ")" || t.text == "]")
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Sessions bind the placeholders that the shell and kernels send values for.
func TestPlaceholders(t *testing.T) {
	lexers := map[string]func(*scanner) kind{"postgres": nil, "mysql": MySQL.lex, "sqlite": SQLite.lex}
	for _, test := range sqlsplittest.Placeholders() {
		for _, engine := range test.Engines {
			if got := ours(lexers[engine], test.Text); !slices.Equal(got, test.Names) {
				t.Errorf("%s: %q: got %q, want %q", engine, test.Text, got, test.Names)
			}
		}
	}
}

// What the shell takes for a placeholder is what a session binds, on each engine: the
// two know the same quotes and comments.
func FuzzSplitAgrees(f *testing.F) {
	for _, text := range []string{
		"select 'a\\'b :a' -- :b\n /* :c /* :d */ :e */ `:f` {{d}} :e 0x1f 1.5e+3 [g :x] # :h", "E'a\\' :a'\n' \\' :b', $a$ :c $a$ $1e':d\\' :e'",
		"1--:a\n--\t:b\n?:c $1:d @x:e 0xe'\\':f' 1e':g\\' :h' U&\"x\":i", "a[1:n] a[:m] a[(1):o] [:p", "{{ a | b }} {{a|}} {{ {{x}} }}", "/*! ':a */ :b", "e'a' -- x\r'\\' :a",
	} {
		f.Add(text)
	}
	for _, test := range sqlsplittest.Placeholders() {
		f.Add(test.Text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for engine, lex := range map[sqlsplit.Engine]func(*scanner) kind{sqlsplit.Postgres: nil, sqlsplit.MySQL: MySQL.lex, sqlsplit.SQLite: SQLite.lex} {
			if got, want := sqlsplit.Placeholders(engine, text), ours(lex, text); !slices.Equal(got, want) {
				t.Fatalf("%s: %q: the shell finds %q, a session %q", engine, text, got, want)
			}
		}
	})
}
