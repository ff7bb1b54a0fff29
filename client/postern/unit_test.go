package main

import (
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestPointAt(t *testing.T) {
	long := strings.Repeat("a, ", 50) + "foo" + strings.Repeat(", b", 50)
	tests := []struct {
		name     string
		text     string
		position int
		want     string
	}{
		{"first character", "slect 1", 1, "LINE 1: slect 1\n        ^\n"},
		{"middle", "select foo from t", 8, "LINE 1: select foo from t\n               ^\n"},
		{"second line", "select 1,\n  foo\nfrom t", 13, "LINE 2:   foo\n          ^\n"},
		{"characters, not bytes", "select 'é', foo", 13, "LINE 1: select 'é', foo\n                    ^\n"},
		{"wide characters", "select '日本', foo", 14, "LINE 1: select '日本', foo\n                       ^\n"},
		{"tabs", "\tselect\tfoo", 9, "LINE 1:  select foo\n                ^\n"},
		{"carriage return", "select\r\nfoo", 9, "LINE 2: foo\n        ^\n"},
		{"at the end", "select (1", 10, "LINE 1: select (1\n                 ^\n"},
		{"at the end, after a line break", "select (1\n\n", 12, "LINE 1: select (1\n                 ^\n"},
		{
			"long line", long, 151,
			"LINE 1: ..." + long[100:150] + long[150:180] + "...\n" + strings.Repeat(" ", 11+50) + "^\n",
		},
		{"escapes are shown", "a\x1bb foo", 5, "LINE 1: a\\x1bb foo\n               ^\n"},
		{"unknown", "select 1", 0, ""},
		{"beyond", "select 1", 10, ""},
		{"negative", "select 1", -1, ""},
		{"no text", "", 1, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if got := pointAt(test.text, test.position); got != test.want {
				t.Errorf("got\n%swant\n%s", got, test.want)
			}
		})
	}
}

func FuzzPointAt(f *testing.F) {
	f.Add("select foo", 8)
	f.Add("a\n\n\x00b\xff", 4)
	f.Fuzz(func(t *testing.T, text string, position int) {
		got := pointAt(text, position)
		if n := strings.Count(got, "\n"); got != "" && (n != 2 || !strings.HasSuffix(got, "^\n")) {
			t.Errorf("%q", got)
		}
	})
}

func TestStatementError(t *testing.T) {
	tests := []struct {
		name string
		err  *proto.Error
		want string
	}{
		{
			"all there is", &proto.Error{Code: proto.CodeSQL, Message: "no", SQL: &posternv1.SQLErrorDetail{Sqlstate: "42703", Position: 1, Detail: "why\nso", Hint: "do"}},
			"ERROR 42703: no\nLINE 1: x\n        ^\nDETAIL:  why so\nHINT:  do\n",
		},
		{"as the host says it", &proto.Error{Code: proto.CodeSQL, Message: "the database refused the statement: no (x) (SQLSTATE 42703, position 8)", SQL: &posternv1.SQLErrorDetail{Sqlstate: "42703"}}, "ERROR 42703: no (x)\n"},
		{"the host's policy", &proto.Error{Code: proto.CodePolicyDenied, Message: "refused", SQL: &posternv1.SQLErrorDetail{Position: 1}}, "refused\nLINE 1: x\n        ^\n"},
		{"no detail", &proto.Error{Code: proto.CodeSQL, Message: "no"}, "ERROR: no\n"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if got := (&statementError{err: test.err, text: "x"}).render(); got != test.want {
				t.Errorf("got %q want %q", got, test.want)
			}
		})
	}
}

func TestTTL(t *testing.T) {
	for text, want := range map[string]time.Duration{"30d": 720 * time.Hour, "90m": 90 * time.Minute, "0d": 0, "d": 0, "-1h": 0, "70000d": 0, "x": 0} {
		var got ttl
		err := got.Set(text)
		if (err == nil) != (want != 0) || got.d != want {
			t.Errorf("%s: %v, %v", text, got.d, err)
		}
	}
}

func TestProgressLine(t *testing.T) {
	if got, want := progressLine(1234567, 100<<20, 50*time.Second), "1,234,567 rows  100.0 MiB  2.0 MiB/s  0:50"; got != want {
		t.Errorf("got %q want %q", got, want)
	}
	if got, want := progressLine(0, 3<<20, 61*time.Second), "3.0 MiB  0.0 MiB/s  1:01"; got != want {
		t.Errorf("got %q want %q", got, want)
	}
	for n, want := range map[int64]string{0: "0", 999: "999", 1000: "1,000", 123456: "123,456"} {
		if got := grouped(n); got != want {
			t.Errorf("got %q want %q", got, want)
		}
	}
}

func TestCommentLast(t *testing.T) {
	const query = "-- a comment\nselect 1"
	for _, tc := range []struct{ args, want string }{
		{"sql|a/b|" + query, "sql|a/b|--|" + query},
		{"sql|a/b|" + query + "|-f|csv", "sql|a/b|-f|csv|--|" + query},
		{"sql|a/b|--|" + query, "sql|a/b|--|" + query},
		{"sql|a/b|select 1|-p|" + query, "sql|a/b|select 1|-p|" + query},
		{"sql|a/b|select 1|--format|csv", "sql|a/b|select 1|--format|csv"},
		{"", ""},
	} {
		if got := strings.Join(commentLast(strings.Split(tc.args, "|")), "|"); got != tc.want {
			t.Errorf("%q: got %q, want %q", tc.args, got, tc.want)
		}
	}
}
