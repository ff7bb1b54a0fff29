package redact

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"testing"
)

const token = "sk-live_9f8e7d6c5b4a"

func set(values ...string) *Set {
	var list []Value
	for i, v := range values {
		list = append(list, Value{fmt.Sprintf("S%d", i), []byte(v)})
	}
	return New(list)
}

func TestText(t *testing.T) {
	s := set(token, "pä'ss\"wö\\rd\n&<x>", "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0\nshort\n-----END KEY-----")
	for name, test := range map[string]struct{ in, want string }{
		"itself":      {"a " + token + " b", "a [secret S0] b"},
		"twice":       {token + token, "[secret S0][secret S0]"},
		"part":        {token[:15], token[:15]},
		"nothing":     {"", ""},
		"hex":         {hex.EncodeToString([]byte(token)), "[secret S0]"},
		"HEX":         {strings.ToUpper(hex.EncodeToString([]byte(token))), "[secret S0]"},
		"repr":        {`'pä\'ss"wö\\rd\n&<x>'`, "'[secret S1]'"},
		"ascii":       {`'p\xe4\'ss"w\xf6\\rd\n&<x>'`, "'[secret S1]'"},
		"bytes":       {`b'p\xc3\xa4\'ss"w\xc3\xb6\\rd\n&<x>'`, `b'p\xc3\xa4\'ss"w\xc3\xb6\\rd\n&<x>'`}, // both quotes: not known
		"JSON":        {`{"k": "pä'ss\"wö\\rd\n&<x>"}`, `{"k": "[secret S1]"}`},
		"ascii JSON":  {`{"k": "p\u00e4'ss\"w\u00f6\\rd\n&<x>"}`, `{"k": "[secret S1]"}`},
		"URL":         {"u?p=" + url.QueryEscape("pä'ss\"wö\\rd\n&<x>"), "u?p=[secret S1]"},
		"HTML":        {"<td>pä&#x27;ss&#34;wö\\rd\n&amp;&lt;x&gt;</td>", "<td>[secret S1]</td>"},
		"a line":      {"x MIIEvQIBADANBgkqhkiG9w0 y", "x [secret S2] y"},
		"short line":  {"short", "short"},
		"PEM's words": {"-----BEGIN KEY-----", "-----BEGIN KEY-----"},
	} {
		t.Run(name, func(t *testing.T) {
			got, changed := s.Text(test.in)
			if got != test.want || changed != (test.in != test.want) {
				t.Errorf("got %q, %v, want %q", got, changed, test.want)
			}
		})
	}
	for before := range 7 {
		for _, e := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding, base64.RawStdEncoding} {
			text := e.EncodeToString([]byte(strings.Repeat("?", before) + token + "?x~"))
			got, _ := s.Text(text)
			if !strings.Contains(got, "[secret S0]") || len(got) > len("[secret S0]")+20 {
				t.Errorf("base64 after %d: %q of %q", before, got, text)
			}
		}
	}
	if New(nil) != nil || set("short") != nil {
		t.Error("a set of nothing is no nil")
	}
	var none *Set
	if got, changed := none.Text(token); got != token || changed {
		t.Error("no set changes a text")
	}
}

func TestJSON(t *testing.T) {
	s := set(token, "with \"quotes\" and ü")
	for _, value := range []any{
		map[string]any{"text/plain": "it is " + token, "n": 1.5, "b": []any{true, nil, token}},
		map[string]any{token: "a key"},
		map[string]any{"x": `with "quotes" and ü`, "html": "<b>&</b>"},
		[]any{},
	} {
		text, err := json.Marshal(value) // with Go's \u003c
		if err != nil {
			t.Fatal(err)
		}
		got := s.JSON(text)
		var back any
		if err := json.Unmarshal(got, &back); err != nil {
			t.Errorf("%s: %v", got, err)
		}
		if strings.Contains(string(got), token) || strings.Contains(fmt.Sprint(back), "quotes") {
			t.Errorf("left in %s", got)
		}
	}
	// Each character may be written as \u.
	var escaped strings.Builder
	for _, c := range token {
		fmt.Fprintf(&escaped, `\u%04x`, c)
	}
	if got := string(s.JSON([]byte(`{"k":"` + escaped.String() + `", "n": 1}`))); got != `{"k":"[secret S0]", "n": 1}` {
		t.Errorf("got %s", got)
	}
	for _, same := range []string{``, `{}`, `{"a": "b\"c", "n": 1e3 }`, `{"a": "never ends`, `"\`} {
		if got := string(s.JSON([]byte(same))); got != same {
			t.Errorf("%s became %s", same, got)
		}
	}
	if got := string(s.JSON([]byte(`no "JSON ` + token))); strings.Contains(got, token) {
		t.Errorf("got %s", got)
	}
}

// However a text is cut into messages, the value is not in what comes out.
func TestStream(t *testing.T) {
	s := set(token, token+"-longer-still", "another-secret")
	text := "s sk sk-live " + token + " x another-secret\n" + token + "-longer-still " + token + "."
	want := "s sk sk-live [secret S0] x [secret S2]\n[secret S1] [secret S0]."
	for size := 1; size <= len(text); size++ {
		var stream Stream
		var out strings.Builder
		for i := 0; i < len(text); i += size {
			out.WriteString(stream.Add(s, text[i:min(len(text), i+size)]))
		}
		out.WriteString(stream.Flush())
		got := out.String()
		// A form that is the beginning of a longer one is taken as it comes.
		if strings.Contains(got, token) || strings.Contains(got, "another-secret") || len(got) < len(want) {
			t.Errorf("in pieces of %d: %q, want like %q", size, got, want)
		}
		if size == len(text) && got != want {
			t.Errorf("whole: %q, want %q", got, want)
		}
	}
	var stream Stream
	if got := stream.Add(s, "Password: s") + "|" + stream.Flush(); got != "Password: |s" {
		t.Errorf("got %q", got)
	}
}

func FuzzSet(f *testing.F) {
	f.Add(token, "before ", " after", 3)
	f.Add("line one is long enough\nline two is long enough", `"`, `\`, 1)
	f.Add("\"\\\u00e4\u2028\U0001f600\x7f\x01", "{", "}", 7)
	f.Fuzz(func(t *testing.T, value, before, after string, cut int) {
		if len(value) < minForm || len(value) > 256 || strings.Contains("[secret S0]", value[:1]) {
			return
		}
		s := set(value)
		text := before + value + after
		if got, _ := s.Text(text); strings.Contains(got, value) {
			t.Errorf("%q is in %q", value, got)
		}
		if cut = cut % (len(text) + 1); cut >= 0 {
			var stream Stream
			if got := stream.Add(s, text[:cut]) + stream.Add(s, text[cut:]) + stream.Flush(); strings.Contains(got, value) {
				t.Errorf("%q is in %q, cut at %d", value, got, cut)
			}
		}
		raw, err := json.Marshal(map[string]string{"k": text})
		if err != nil {
			return
		}
		var back map[string]string
		if err := json.Unmarshal(s.JSON(raw), &back); err != nil {
			t.Errorf("no JSON any more: %v", err)
		} else if strings.Contains(back["k"], strings.ToValidUTF8(value, "\ufffd")) && strings.ToValidUTF8(value, "") == value {
			t.Errorf("%q is in %q", value, back["k"])
		}
	})
}

// A value of the largest size, of lines that begin alike, costs no more than some
// milliseconds to prepare and to look for.
func BenchmarkLargest(b *testing.B) {
	var lines strings.Builder
	for i := 0; lines.Len() < 32<<10-64; i++ {
		fmt.Fprintf(&lines, "    \"entry\": \"%040d\",\n", i)
	}
	text := strings.Repeat("    \"entry\": \"another\"\n", 1000)
	for b.Loop() {
		var stream Stream
		stream.Add(set(lines.String()), text)
	}
}

func BenchmarkText(b *testing.B) {
	var values []string
	for i := range 64 {
		values = append(values, fmt.Sprintf("%s-%d-%040d", token, i, i))
	}
	s := set(values...)
	text := strings.Repeat("2026-11-22 10:00:00 INFO some line of a log, as programs print them\n", 4096)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		if _, changed := s.Text(text); changed {
			b.Fatal("found")
		}
	}
}
