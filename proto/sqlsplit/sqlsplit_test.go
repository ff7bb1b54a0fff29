package sqlsplit

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/postern-dev/postern/proto/sqlsplit/sqlsplittest"
)

func feed(s *Splitter, text string) (got []string) {
	for line := range strings.SplitAfterSeq(text, "\n") {
		got = append(got, s.Feed(line)...)
	}
	return got
}

func TestSplitter(t *testing.T) {
	type test struct {
		name, text string
		want       []string
		pending    string
		mark       string
	}
	all := []Engine{Postgres, MySQL, SQLite}
	groups := []struct {
		engines []Engine
		tests   []test
	}{
		{all, []test{
			{"plain", "select 1; select 2;", []string{"select 1", "select 2"}, "", "="},
			{"lines", "select\n1\n;", []string{"select\n1"}, "", "="},
			{"open", "select 1", nil, "select 1", "-"},
			{"empty statements", ";; \n;", nil, "", "="},
			{"quotes", `select ';', ";", 'it''s;', "a"";";`, []string{`select ';', ";", 'it''s;', "a"";"`}, "", "="},
			{"quotes over lines", "select ';\n;', 2;", []string{"select ';\n;', 2"}, "", "="},
			{"comments", "select 1 -- x;\n, /* ; \n ; */ 2;", []string{"select 1 -- x;\n, /* ; \n ; */ 2"}, "", "="},
			{"comment at the end", "select 1; --", []string{"select 1"}, "", "="},
			{"comment alone", "-- x\n/* y */ ;", nil, "", "="},
			{"begin", "begin; select 1; end;", []string{"begin", "select 1", "end"}, "", "="},
			{"case", "select case when 1 then 2 end; select 1;", []string{"select case when 1 then 2 end", "select 1"}, "", "="},
			{"in quotes", "select 'x", nil, "select 'x", "'"},
			{"in double quotes", `select "x`, nil, `select "x`, `"`},
			{"in a comment", "select /*", nil, "select /*", "*"},
			{"quote in a comment", "select /* ' */ 1; -- '\nselect 2;", []string{"select /* ' */ 1", "-- '\nselect 2"}, "", "="},
			{"unicode", "select 'é;😀' ü;", []string{"select 'é;😀' ü"}, "", "="},
			{"placeholder", "select {{a}}, :b;", []string{"select {{a}}, :b"}, "", "="},
		}},
		{[]Engine{Postgres}, []test{
			{"escapes", `select E'\';', e'\\';x;`, []string{`select E'\';', e'\\'`, "x"}, "", "="},
			{"escapes go on", "select e'a' -- '\n  'b\\';' ;x;", []string{"select e'a' -- '\n  'b\\';'", "x"}, "", "="},
			{"escapes go on only over lines", `select e'a' 'b\';x;`, []string{`select e'a' 'b\'`, "x"}, "", "="},
			{"no escapes", `select '\';x;`, []string{`select '\'`, "x"}, "", "="},
			{"name before a quote", `select one'\';`, []string{`select one'\'`}, "", "="},
			{"number before a quote", `select 0xe'\', 1e'\';';`, []string{`select 0xe'\', 1e'\';'`}, "", "="},
			{"dollar", "do $$ a; $x$ b; $$; select $x$ $$; $x$;", []string{"do $$ a; $x$ b; $$", "select $x$ $$; $x$"}, "", "="},
			{"dollar over lines", "do $$ a;\n$ b; $\n$$; c;", []string{"do $$ a;\n$ b; $\n$$", "c"}, "", "="},
			{"dollar in a name", "select a$$;b$$;", []string{"select a$$", "b$$"}, "", "="},
			{"native", "execute $1;", []string{"execute $1"}, "", "="},
			{"nested comments", "select 1 /* ; /* ; */ ; */ 2;", []string{"select 1 /* ; /* ; */ ; */ 2"}, "", "="},
			{"a comment ends with the carriage, too", "select 1 -- x\r; select 2;", []string{"select 1 -- x", "select 2"}, "", "="},
			{"no other comments", "select 1 # 2; select `;", []string{"select 1 # 2", "select `"}, "", "="},
			{"parentheses", "create rule r as on insert to t do (select 1; select 2);", []string{"create rule r as on insert to t do (select 1; select 2)"}, "", "="},
			{"in parentheses", "select (1", nil, "select (1", "("},
			{"atomic", "create or replace function f() returns int begin atomic select 1; select case when true then 1 end; end; select 1;", []string{"create or replace function f() returns int begin atomic select 1; select case when true then 1 end; end", "select 1"}, "", "="},
			{"in a dollar quote", "select $a$x", nil, "select $a$x", "$"},
			{"no delimiter", "delimiter //\n;", []string{"delimiter //"}, "", "="},
		}},
		{[]Engine{MySQL}, []test{
			{"escapes", `select 'it\'s; x', "a\";", '\\'; select 2;`, []string{`select 'it\'s; x', "a\";", '\\'`, "select 2"}, "", "="},
			{"escapes over lines", "select 'a\\\n\\'; x'; select 2;", []string{"select 'a\\\n\\'; x'", "select 2"}, "", "="},
			{"after a charset and in a bit string", `select _utf8'\';', N'\';', x'00';y;`, []string{`select _utf8'\';', N'\';', x'00'`, "y"}, "", "="},
			{"backticks", "select `;`, `a``;`, `\\`; select 2;", []string{"select `;`, `a``;`, `\\`", "select 2"}, "", "="},
			{"in backticks", "select `x", nil, "select `x", "`"},
			{"hash", "select 1 # it's;\n; select 2; #;", []string{"select 1 # it's;", "select 2"}, "", "="},
			{"a difference", "select 1--1; select 2 -- ;\n; select 3 --\t;\n;", []string{"select 1--1", "select 2 -- ;", "select 3 --\t;"}, "", "="},
			{"difference and a quote", "select 1--'a;b'; select 2;", []string{"select 1--'a;b'", "select 2"}, "", "="},
			{"comments do not nest", "select /* /* ; */ 1; select 2;", []string{"select /* /* ; */ 1", "select 2"}, "", "="},
			{"code in comments is a statement", "/*!40101 set names utf8 */; /*M!100000 x; */;", []string{"/*!40101 set names utf8 */", "/*M!100000 x; */"}, "", "="},
			{"no dollar quotes", "select $$; select a$$;", []string{"select $$", "select a$$"}, "", "="},
			{"no E", `select e'a\'; x';`, []string{`select e'a\'; x'`}, "", "="},
			{"parentheses", "select (1; select 2);", []string{"select (1", "select 2)"}, "", "="},
			{
				"procedure", "create definer = `a`@`b` procedure p(in x int) begin if x then select 1; end if; case x when 1 then select case x when 1 then 2 end; end case; l: loop leave l; end loop l; end; select 1;",
				[]string{"create definer = `a`@`b` procedure p(in x int) begin if x then select 1; end if; case x when 1 then select case x when 1 then 2 end; end case; l: loop leave l; end loop l; end", "select 1"},
				"", "=",
			},
			{"trigger over lines", "CREATE OR REPLACE TRIGGER t BEFORE INSERT ON a FOR EACH ROW\nBEGIN\n SET NEW.x = 1;\n BEGIN\n END;\nEND;\nselect 1;", []string{"CREATE OR REPLACE TRIGGER t BEFORE INSERT ON a FOR EACH ROW\nBEGIN\n SET NEW.x = 1;\n BEGIN\n END;\nEND", "select 1"}, "", "="},
			{"no body", "create procedure p() select 1; select 2;", []string{"create procedure p() select 1", "select 2"}, "", "="},
			{"a table", "create table t (begin int, function int); select 2;", []string{"create table t (begin int, function int)", "select 2"}, "", "="},
			{"in a body", "create procedure p() begin select 1;", nil, "create procedure p() begin select 1;", "-"},
			{"delimiter", "DELIMITER //\ncreate procedure p() if 1 then select 1; end if//\nselect ';//'//\nselect 1; select 2//\ndelimiter ;\nselect 3; select 4;", []string{"create procedure p() if 1 then select 1; end if", "select ';//'", "select 1; select 2", "select 3", "select 4"}, "", "="},
			{"delimiter that can be in words", "delimiter $$\ncreate procedure p() begin select 1; end$$ select 2$$", []string{"create procedure p() begin select 1; end", "select 2"}, "", "="},
			{"delimiter that is none", "delimiter\n; delimiter '\n';", []string{"delimiter", "delimiter '\n'"}, "", "="},
		}},
		{[]Engine{SQLite}, []test{
			{"no escapes", `select 'a\'; select 2;`, []string{`select 'a\'`, "select 2"}, "", "="},
			{"no E", `select e'\'; select 2;`, []string{`select e'\'`, "select 2"}, "", "="},
			{"brackets and backticks", "select [;'], `;```, [a\n;]; select 2;", []string{"select [;'], `;```, [a\n;]", "select 2"}, "", "="},
			{"in brackets", "select [x", nil, "select [x", "["},
			{"comments do not nest", "select /* /* ; */ 1; select 2;", []string{"select /* /* ; */ 1", "select 2"}, "", "="},
			{"dashes need no blank", "select 1 --x;\n;", []string{"select 1 --x;"}, "", "="},
			{"no hash", "select 1 # it's;';", []string{"select 1 # it's;'"}, "", "="},
			{"no dollar quotes", "select $a$; select $$;", []string{"select $a$", "select $$"}, "", "="},
			{"trigger", "create trigger t after insert on a begin select case when 1 then 2 end; update a set x = ';end;'; end; select 1;", []string{"create trigger t after insert on a begin select case when 1 then 2 end; update a set x = ';end;'; end", "select 1"}, "", "="},
			{"temporary trigger", "CREATE TEMP TRIGGER IF NOT EXISTS t AFTER INSERT ON a BEGIN\n SELECT 1;\n -- done;\nEND;\nselect 1;", []string{"CREATE TEMP TRIGGER IF NOT EXISTS t AFTER INSERT ON a BEGIN\n SELECT 1;\n -- done;\nEND", "select 1"}, "", "="},
			{"plan of a trigger", "explain query plan create temporary trigger t after insert on a begin select 1; end; select 1;", []string{"explain query plan create temporary trigger t after insert on a begin select 1; end", "select 1"}, "", "="},
			{"in a trigger", "create trigger t after insert on a begin select 1;", nil, "create trigger t after insert on a begin select 1;", "-"},
			{"a table", "create table trigger_log (begin int); end;", []string{"create table trigger_log (begin int)", "end"}, "", "="},
			{"parentheses", "select (1; select 2);", []string{"select (1", "select 2)"}, "", "="},
		}},
	}
	for _, g := range groups {
		for _, engine := range g.engines {
			for _, test := range g.tests {
				t.Run(string(engine)+"/"+test.name, func(t *testing.T) {
					s := New(engine)
					got := feed(s, test.text)
					if !reflect.DeepEqual(got, test.want) || s.Pending() != test.pending || s.Mark() != test.mark {
						t.Errorf("got %q, pending %q, mark %s; want %q, %q, %s", got, s.Pending(), s.Mark(), test.want, test.pending, test.mark)
					}
				})
			}
		}
	}
}

func TestPlaceholders(t *testing.T) {
	for _, test := range sqlsplittest.Placeholders() {
		for _, engine := range test.Engines {
			if got := Placeholders(Engine(engine), test.Text); !slices.Equal(got, test.Names) {
				t.Errorf("%s: %q: got %q, want %q", engine, test.Text, got, test.Names)
			}
		}
	}
	braced, colons := PlaceholdersByForm(Postgres, "select :b, {{c}}, {{a}}, :a, :b, {{c|list}}")
	if !slices.Equal(braced, []string{"a", "c"}) || !slices.Equal(colons, []string{"a", "b"}) {
		t.Errorf("got %q and %q", braced, colons)
	}
}

func TestParseEngine(t *testing.T) {
	for _, name := range []string{"postgres", "mysql", "sqlite"} {
		if e, err := ParseEngine(name); err != nil || string(e) != name || New(e).Engine() != e {
			t.Errorf("%s: got %q, %v", name, e, err)
		}
	}
	for _, name := range []string{"", "oracle", "PostgreSQL"} {
		if e, err := ParseEngine(name); err == nil {
			t.Errorf("%q became %q", name, e)
		}
	}
}

// However a text is cut into lines and statements, nothing is lost and nothing made
// up, and a statement that was cut off is whole for another Splitter, too.
func FuzzSplitter(f *testing.F) {
	for _, text := range []string{
		"select ';'; x", "E'\\';' $a$;$a$ /* ; */ -- ;\n;", "create function f begin atomic a; end;", "{{a}} :b ::c", "create trigger t begin a; end; b",
		"DELIMITER //\nselect 1//\n", "`;` [;] # ;\n 1--1; /*! ; */", "e'a'\n'\\';';", "create procedure p() begin case end case; end; x",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for _, engine := range []Engine{Postgres, MySQL, SQLite} {
			s := New(engine)
			rest := text // what is not accounted for yet
			take := func(statement string) {
				at := strings.Index(rest, statement)
				if at < 0 {
					t.Fatalf("%s: %q is not in what is left, %q, of %q", engine, statement, rest, text)
				}
				rest = rest[at+len(statement):]
			}
			for line := range strings.SplitAfterSeq(text, "\n") {
				for _, statement := range s.Feed(line) {
					if statement == "" || s.delimiter == "" {
						t.Fatalf("%s: an empty statement of %q", engine, text)
					}
					take(statement)
					again := New(engine)
					again.delimiter = s.delimiter
					if more := feed(again, statement); len(more) != 0 && !strings.Contains(strings.ToLower(statement), "delimiter") {
						t.Fatalf("%s: %q was cut off and then cut again into %q", engine, statement, more)
					}
				}
			}
			take(s.Pending())
			if s.Empty() != (s.Pending() == "" && s.Open() == 0) || s.Len() != len(s.Text()) {
				t.Fatalf("%s: %q: empty is %t", engine, text, s.Empty())
			}
			if names := Placeholders(engine, text); !slices.IsSorted(names) {
				t.Fatalf("%s: got %q", engine, names)
			}
		}
	})
}
