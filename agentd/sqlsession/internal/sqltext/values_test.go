package sqltext

import (
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"
)

func bound(t *testing.T, d *Dialect, text string, pairs ...string) (*Statement, error) {
	t.Helper()
	var list []Value
	for _, pair := range pairs {
		name, value, ok := strings.Cut(pair, "=")
		v := Value{Name: name}
		if ok {
			v.Text = &value
		}
		list = append(list, v)
	}
	return d.Bind(text, list)
}

func args(s *Statement) string {
	var out []string
	for _, a := range s.Args {
		if a.Text == nil {
			out = append(out, "NULL")
		} else {
			out = append(out, *a.Text)
		}
	}
	return strings.Join(out, "|")
}

func TestForms(t *testing.T) {
	long := strings.Repeat("é", 31)
	tests := []struct {
		name, text, value string
		want, args, err   string
	}{
		{name: "identifier", text: "select * from {{x|identifier}}", value: "x=orders", want: `select * from "orders"`},
		{name: "schema", text: "select * from {{ x | identifier }} t", value: "x=Shop.Orders 2", want: `select * from "Shop"."Orders 2" t`},
		{name: "quoted names", text: "table {{x|identifier}}", value: `x="a.b"."c""d".e`, want: `table "a.b"."c""d"."e"`},
		{name: "attack", text: "select {{x|identifier}}", value: `x=a" from t; drop table t --`, want: `select "a"" from t; drop table t --"`},
		{name: "no U& in front", text: `select U&{{x|identifier}}`, value: `x=\0041`, want: `select U& "\0041"`},
		{name: "glued", text: `select a{{x|identifier}}"b"`, value: `x=q`, want: `select a "q" "b"`},
		{name: "longest", text: "select {{x|identifier}}", value: "x=" + long + "a", want: `select "` + long + `a"`},
		{name: "too long", text: "select {{x|identifier}}", value: "x=" + long + "ab", err: "64 bytes, more than 63"},
		{name: "empty", text: "select {{x|identifier}}", value: "x=", err: "at least one character"},
		{name: "empty part", text: "select {{x|identifier}}", value: "x=a..b", err: "at least one character"},
		{name: "ends in a point", text: "select {{x|identifier}}", value: "x=a.", err: "at least one character"},
		{name: "empty quotes", text: "select {{x|identifier}}", value: `x=""`, err: "at least one character"},
		{name: "NUL", text: "select {{x|identifier}}", value: "x=a\x00b", err: "NUL"},
		{name: "not UTF-8", text: "select {{x|identifier}}", value: "x=a\xff", err: "UTF-8"},
		{name: "open quote", text: "select {{x|identifier}}", value: `x="a`, err: "not closed"},
		{name: "behind the quote", text: "select {{x|identifier}}", value: `x="a"b`, err: "behind a closed quote"},
		{name: "four names", text: "select {{x|identifier}}", value: "x=a.b.c.d", err: "more than 3 names"},
		{name: "NULL identifier", text: "select {{x|identifier}}", value: "x", err: "no identifier"},
		{name: "unknown form", text: "select {{x|raw}}", value: "x=1", err: `position 8: {{x|raw}}: there is no form "raw"`},

		{name: "list", text: "select 1 where i in ({{x|list}})", value: `x=[1, 2.50, "a,b", true, null]`, want: "select 1 where i in ($1, $2, $3, $4, $5)", args: "1|2.50|a,b|true|NULL"},
		{name: "one element", text: "select 1 where i in ({{x|list}})", value: "x=a", want: "select 1 where i in ($1)", args: "a"},
		{name: "twice", text: "select i in ({{x|list}}), j in ({{x|list}}), {{x}}", value: "x=[1,2]", want: "select i in ($1, $2), j in ($1, $2), $3", args: "1|2|[1,2]"},
		{name: "empty list", text: "select i in ({{x|list}})", value: "x=[]", want: "select i OPERATOR(=) ANY ('{}')"},
		{name: "empty not", text: "select i Not /*c*/ In -- x\n ( {{x|list}} )", value: "x= [ ] ", want: "select i OPERATOR(<>) ALL /*c*/  -- x\n ( '{}' )"},
		{name: "list elsewhere", text: "select {{x|list}}", value: "x=[1]", err: "position 8: parameter \"x\": a list stands alone in the parentheses after IN"},
		{name: "list with others", text: "select i in (1, {{x|list}})", value: "x=[1]", err: "stands alone"},
		{name: "others behind", text: "select i in ({{x|list}}, 1)", value: "x=[1]", err: "stands alone"},
		{name: "quoted in", text: `select i "in" ({{x|list}})`, value: "x=[1]", err: "stands alone"},
		{name: "nested", text: "select i in ({{x|list}})", value: "x=[[1]]", err: "no JSON array"},
		{name: "object", text: "select i in ({{x|list}})", value: `x=[{"a":1}]`, err: "no JSON array"},
		{name: "garbage", text: "select i in ({{x|list}})", value: "x=[1", err: "no JSON array"},
		{name: "garbage behind", text: "select i in ({{x|list}})", value: "x=[1] 2", err: "no JSON array"},
		{name: "half a pair", text: "select i in ({{x|list}})", value: `x=["\ud800"]`, err: "not valid Unicode"},
		{name: "replacement character", text: "select i in ({{x|list}})", value: `x=["\uFFFD"]`, want: "select i in ($1)", args: "\uFFFD"},
		{name: "NULL list", text: "select i in ({{x|list}})", value: "x", err: "no list"},
		{name: "too many", text: "select i in ({{x|list}})", value: "x=[" + strings.Repeat("1,", MaxList) + "1]", err: "more than 10000 elements"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := bound(t, PostgreSQL, test.text, test.value)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Fatalf("got %v, want an error with %q", err, test.err)
				}
				return
			}
			if err != nil || got.Text != test.want || args(got) != test.args {
				t.Fatalf("got %q %q, %v\nwant %q %q", got.Text, args(got), err, test.want, test.args)
			}
		})
	}
}

func TestUnnumbered(t *testing.T) {
	d := &Dialect{Placeholder: func(int) string { return "?" }, Identifier: postgresIdentifier, EmptyList: "SELECT NULL WHERE 0"}
	s, err := bound(t, d, "select {{x}}, :x, i in ({{l|list}}), j not in ({{l|list}}), k in ({{e|list}})", "x=7", "l=[1,2]", "e=[]")
	if err != nil {
		t.Fatal(err)
	}
	if want := "select ?, ?, i in (?, ?), j not in (?, ?), k in (SELECT NULL WHERE 0)"; s.Text != want || args(s) != "7|7|1|2|1|2" {
		t.Errorf("got %q %q, want %q", s.Text, args(s), want)
	}
}

// Positions behind a rewritten NOT IN are still those of the user's text.
func TestPositionBehindForms(t *testing.T) {
	const text = "select é not  in ({{e|list}}), {{t|identifier}}.c, in_({{v}}), oops"
	s, err := bound(t, PostgreSQL, text, "e=[]", "t=ö.x", "v=1")
	if err != nil {
		t.Fatal(err)
	}
	runes := func(text, mark string) int { return utf8.RuneCountInString(text[:strings.Index(text, mark)]) + 1 }
	for _, mark := range []string{"é", "), ", ".c", "in_", "oops"} {
		if got, want := s.Position(runes(s.Text, mark)), runes(text, mark); got != want {
			t.Errorf("%s of %q: got %d, want %d", mark, s.Text, got, want)
		}
	}
	for mark, want := range map[string]string{"OPERATOR": "not", "ALL": "not", "'{}'": "{{e", `"ö"`: "{{t", `x"`: "{{t"} {
		if got, want := s.Position(runes(s.Text, mark)), runes(text, want); got != want {
			t.Errorf("%s of %q: got %d, want %d", mark, s.Text, got, want)
		}
	}
}

func TestArrayLiteral(t *testing.T) {
	for in, want := range map[string]string{
		"{1,2}": "{1,2}", "[0:1]={1,2}": "[0:1]={1,2}", `[1,"a\"b\\",null,"",true]`: `{"1","a\"b\\",NULL,"","true"}`, "[]": "{}", "[1": "[1", "": "",
	} {
		if got := ArrayLiteral(in); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
}

// FuzzIdentifier checks that whatever the value, the text around it stays what
// it was: the identifier is made of quoted tokens and points alone.
func FuzzIdentifier(f *testing.F) {
	for _, value := range []string{"a", "a.b", `"a.b".c`, `a"; drop table t; --`, `"""`, `\`, "a\nb", "é.😀", `$$`, `'`, "/*", `U&"x"`} {
		f.Add(value)
	}
	f.Fuzz(func(t *testing.T, value string) {
		s, err := PostgreSQL.Bind("a {{x|identifier}} b", []Value{{Name: "x", Text: &value}})
		if err != nil {
			return
		}
		scan := scanner{text: s.Text}
		var kinds []string
		names := 0
		for {
			token, ok := scan.next()
			if !ok {
				break
			}
			if token.kind == quoted {
				names++
				inner := strings.ReplaceAll(token.text[1:len(token.text)-1], `""`, `"`)
				if token.text[0] != '"' || inner == "" || len(inner) > 63 || strings.Contains(inner, "\x00") {
					t.Fatalf("%q became %q", value, token.text)
				}
				kinds = append(kinds, "Q")
				continue
			}
			kinds = append(kinds, token.text)
		}
		want := "a| |Q" + strings.Repeat("|.|Q", names-1) + "| |b"
		if got := strings.Join(kinds, "|"); got != want || len(s.Args) != 0 {
			t.Fatalf("%q: the tokens are %s, want %s", value, got, want)
		}
	})
}

func ExampleDialect_Bind() {
	table, ids := "shop.orders", "[1,2]"
	s, _ := PostgreSQL.Bind("select * from {{t|identifier}} where id in ({{ids|list}})", []Value{{Name: "t", Text: &table}, {Name: "ids", Text: &ids}})
	fmt.Println(s.Text)
	// Output: select * from "shop"."orders" where id in ($1, $2)
}
