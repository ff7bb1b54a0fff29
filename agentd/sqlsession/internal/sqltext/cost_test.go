package sqltext

import (
	"strings"
	"testing"
)

func TestLaborious(t *testing.T) {
	const big = 1 << 20
	tests := []struct {
		name, text string
		want       int
	}{
		{"nothing", "", 0},
		{"plain", "SELECT 1 + 2 /* a comment */ -- another", 0},
		{"many additions", "SELECT 1" + strings.Repeat("+1", big), 0},
		{"many comments", strings.Repeat("/* a */ ", big/4), 0},
		{"a decorated comment", "/" + strings.Repeat("*", 4*big) + "/ SELECT 1", 0},
		{"a line of minuses", "SELECT 1 " + strings.Repeat("-", 4*big), 0},
		{"a literal", "SELECT '" + strings.Repeat("/**/", big) + "'", 0},
		{"a dollar quote", "SELECT $a$" + strings.Repeat("/*", big) + "$a$", 0},
		{"a name", `SELECT 1 AS "` + strings.Repeat("+", big) + `"`, 0},
		{"open comments", "SELECT é " + strings.Repeat("/*", big), 10},
		{"comments in a row", "SELECT 1 " + strings.Repeat("/**/", big), 9 + 1},
		{"comments in a comment", "SELECT 1 /*" + strings.Repeat("/**/", big) + "*/", 10},
		{"pluses", "SELECT 1 " + strings.Repeat("+", big), 10},
		{"runs of pluses", "SELECT 1 " + strings.Repeat(strings.Repeat("+", 1000)+" ", big/1000), 10},
	}
	for _, test := range tests {
		got, is := Laborious(test.text)
		if is != (test.want > 0) {
			t.Errorf("%s: got %v at %d, want %d", test.name, is, got, test.want)
		}
		if is && got < test.want {
			t.Errorf("%s: at %d, want at or behind %d", test.name, got, test.want)
		}
	}
}
