package textmask

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"
)

func compile(t testing.TB, patterns ...string) *Set {
	t.Helper()
	s, err := Compile([]Rule{{Patterns: patterns}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

const (
	card  = `\b\d{13,19}\b`
	email = `[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}`
)

func TestString(t *testing.T) {
	s := compile(t, card, email, `(?i)secret-k[a-z]+`)
	for _, test := range []struct{ in, want string }{
		{"", ""},
		{"nothing here", "nothing here"},
		{"card 4111111111111111.", "card ***."},
		{"x4111111111111111", "x4111111111111111"}, // no word boundary
		{"411111111111", "411111111111"},
		{"to alice@example.com and bob@example.org!", "to *** and ***!"},
		{"SECRET-Key", "***"},
		{"SECRET-\u212Aey", "SECRET-\u212Aey"}, // [a-z] fold does not stand for k here
		{"é4111111111111111é", "é***é"},
	} {
		if test.in == "SECRET-\u212Aey" {
			test.want = regexp.MustCompile(`(?i)secret-k[a-z]+`).ReplaceAllString(test.in, Mark)
		}
		if got := s.String(test.in); got != test.want {
			t.Errorf("%q: got %q, want %q", test.in, got, test.want)
		}
	}
}

func TestJSON(t *testing.T) {
	s := compile(t, card, email)
	for _, test := range []struct{ in, want string }{
		{`{"a":"alice@example.com"}`, `{"a":"***"}`},
		{`{"alice@example.com": [1, "x\ny alice\u0040example.com\n"]}`, `{"***": [1, "x\u000ay ***\u000a"]}`},
		{`[4111111111111111, -4111111111111111, 1.5e3]`, `["***", "-***", 1.5e3]`},
		{`{"a":"b\"c"}`, `{"a":"b\"c"}`},
		{`"\ud83d alice@example.com"`, "\"\uFFFD ***\""},
		{`{}`, `{}`},
	} {
		got, found := s.AppendJSON([]byte("x"), []byte(test.in))
		if !found {
			got = append(got, test.in...)
		}
		if string(got) != "x"+test.want {
			t.Errorf("%s: got %s, want %s", test.in, got[1:], test.want)
		}
		if !json.Valid(got[1:]) {
			t.Errorf("%s: no JSON: %s", test.in, got)
		}
	}
}

func TestXML(t *testing.T) {
	s := compile(t, email)
	got, found := s.AppendXML(nil, []byte(`<a b="alice&#64;example.com">bob&#x40;example.com&#60;</a>`))
	if want := `<a b="***">***&#60;</a>`; !found || string(got) != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestReplace(t *testing.T) {
	s, err := Compile([]Rule{
		{Patterns: []string{card}, Replace: func(dst, m []byte) []byte { return append(append(dst, '#'), m[len(m)-4:]...) }},
		{Patterns: []string{`foo`}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := s.String("foo 4111111111111234"); got != "*** #1234" {
		t.Errorf("got %q", got)
	}
}

func TestRefused(t *testing.T) {
	for _, p := range []string{"(", "a*", strings.Repeat("a", MaxPattern+1)} {
		if _, err := Compile([]Rule{{Patterns: []string{p}}}); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%.20q: got %v", p, err)
		}
	}
	if _, err := Compile([]Rule{{Patterns: make([]string, MaxPatterns+1)}}); err == nil {
		t.Error("too many patterns are taken")
	}
}

// The fast look must never miss what the pattern finds.
func TestNeed(t *testing.T) {
	patterns := []string{
		card, email, `abc`, `(?i)abk`, `a+b?c`, `(foo|bar)\d+`, `[^a]b`, `x{3}y*z`, `\bé+`, `.{5}`, `(?s:.)a`, `[a-c]{2,3}d|e{4}`, `(ab){2}`, `^a`, `a$`,
		`\p{L}1`, `(?:a|bc)(?:d|)e`,
	}
	random := rand.New(rand.NewPCG(1, 2))
	alphabet := []rune("abcdexyzABKKk\u212A019 @.é-fo\n")
	found := 0
	for _, p := range patterns {
		re, n := regexp.MustCompile(p), needOf(p)
		for range 20000 {
			var b strings.Builder
			for range random.IntN(25) {
				b.WriteRune(alphabet[random.IntN(len(alphabet))])
			}
			if re.MatchString(b.String()) {
				found++
				if !n.in([]byte(b.String())) {
					t.Fatalf("%s: %q matches and was not seen: %+v", p, b.String(), n.run)
				}
			}
		}
	}
	if found < 1000 {
		t.Fatalf("only %d matches", found)
	}
	if n := needOf(card); n.run != 13 || n.in([]byte("no digits 123456789012 x")) {
		t.Errorf("a card's digits: run %d", n.run)
	}
}

func FuzzJSON(f *testing.F) {
	f.Add(`{"a":"4111111111111111","b":[4111111111111111,"\u0034"]}`)
	s := compile(f, card, email)
	f.Fuzz(func(t *testing.T, text string) {
		out, found := s.AppendJSON(nil, []byte(text))
		if !found {
			out = []byte(text)
		}
		if json.Valid([]byte(text)) && !json.Valid(out) {
			t.Errorf("%q became %q", text, out)
		}
	})
}

func BenchmarkNothing(b *testing.B) {
	s := compile(b, card, email)
	text := bytes.Repeat([]byte("the quick brown fox 12345 jumps. "), 1000)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		s.Append(nil, text)
	}
}
