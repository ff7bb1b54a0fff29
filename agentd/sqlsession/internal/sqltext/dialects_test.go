package sqltext

import (
	"strings"
	"testing"
)

func TestDialects(t *testing.T) {
	x := "v"
	for _, test := range []struct {
		name    string
		dialect *Dialect
		text    string
		want    string
		args    int
	}{
		{"mysql", MySQL, "select {{x}}, :x", "select ?, ?", 2},
		{"mysql strings", MySQL, `select ':x \' {{x}}', ":x \" {{x}}", 'a'':x', {{x}}`, `select ':x \' {{x}}', ":x \" {{x}}", 'a'':x', ?`, 1},
		{"mysql strings on two lines", MySQL, "select 'a'\n\":x\", :x", "select 'a'\n\":x\", ?", 1},
		{"mysql comments", MySQL, "select # :x\n 1--:x\n -- :x\n /* :x */", "select # :x\n 1--?\n -- :x\n /* :x */", 1},
		{"mysql names", MySQL, "select `:x` , {{x|identifier}} , :x", "select `:x` , `v` , ?", 1},
		{"mysql assignment", MySQL, "select @a:=1, :x", "select @a:=1, ?", 1},
		{"sqlite", SQLite, "select {{x}}, :x", "select ?1, ?1", 1},
		{"sqlite strings", SQLite, `select ':x\', ":x", [:x], {{x}}`, `select ':x\', ":x", [:x], ?1`, 1},
		{"sqlite comments", SQLite, "select -- :x\n /* /* :x */ :x", "select -- :x\n /* /* :x */ ?1", 1},
	} {
		s, err := test.dialect.Bind(test.text, []Value{{Name: "x", Text: &x}})
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
		} else if s.Text != test.want || len(s.Args) != test.args {
			t.Errorf("%s: got %q with %d values, want %q with %d", test.name, s.Text, len(s.Args), test.want, test.args)
		}
	}
	for text, d := range map[string]*Dialect{"select ?": MySQL, "select ?2": SQLite, "select @x": SQLite, "select $x": SQLite} {
		if _, err := d.Bind(text, nil); err == nil || !strings.Contains(err.Error(), "is not supported: write {{name}}") {
			t.Errorf("%s: got %v", text, err)
		}
	}
	for _, name := range []string{"", "a\x00", "\xff", strings.Repeat("x", 65), "a "} {
		if got, err := MySQL.Identifier(name); err == nil {
			t.Errorf("%q became %s", name, got)
		}
	}
	if got, _ := MySQL.Identifier("a`b"); got != "`a``b`" {
		t.Errorf("got %s", got)
	}
	if got, _ := SQLite.Identifier(`a"b`); got != `"a""b"` {
		t.Errorf("got %s", got)
	}
}

// The tokens of a text join to the text, whatever it is.
func FuzzDialects(f *testing.F) {
	f.Add("select 'a\\'b' -- x\n /* y */ `c` {{d}} :e 0x1f 1.5e+3 [g] # h")
	f.Fuzz(func(t *testing.T, text string) {
		for _, d := range []*Dialect{MySQL, SQLite} {
			scan := scanner{text: text, lex: d.lex}
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
				t.Fatalf("got %q, want %q", joined.String(), text)
			}
			for p := range d.Pieces(text) {
				if p.Position < 1 {
					t.Fatalf("%q: %+v", text, p)
				}
			}
		}
	})
}
