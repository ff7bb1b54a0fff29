package shim

import (
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

// joined puts the pieces of a content together again.
func joined(t *testing.T, in io.Reader) (name, text string, n int, err error) {
	t.Helper()
	var out strings.Builder
	err = pieces(in, func(jsonName, piece []byte) error {
		n++
		if len(piece) > pieceBytes {
			t.Errorf("a piece of %d bytes", len(piece))
		}
		if err := json.Unmarshal(jsonName, &name); err != nil {
			return err
		}
		var s string
		if err := json.Unmarshal([]byte(`"`+string(piece)+`"`), &s); err != nil {
			return err
		}
		out.WriteString(s)
		return nil
	})
	return name, out.String(), n, err
}

func TestPieces(t *testing.T) {
	text := strings.Repeat("aä€😀\n\"\\\u2028", 100_000)
	plain, err := json.Marshal(map[string]string{"name": "stderr", "text": text})
	if err != nil {
		t.Fatal(err)
	}
	escaped := `{ "name" : "stderr", "text" : "` + strings.Repeat(`a\u00e4€\ud83d\ude00\n\"\\\u2028`, 100_000) + `" }`
	for _, content := range []string{string(plain), escaped} {
		for _, in := range []io.Reader{strings.NewReader(content), iotest.HalfReader(strings.NewReader(content)), iotest.DataErrReader(strings.NewReader(content))} {
			name, got, n, err := joined(t, in)
			if err != nil || name != "stderr" || got != text || n < 5 {
				t.Errorf("%d bytes of %q in %d pieces, %v; want %d", len(got), name, n, err, len(text))
			}
		}
	}
	for in, want := range map[string]error{
		`{"text":"x"}`: nil, `{"name":"stdout","text":""}`: nil,
		``: errNoStream, `[]`: errNoStream, `{"other":"x"}`: errNoStream, `{"name":1}`: errNoStream, `{"name":"` + strings.Repeat("n", 200) + `"}`: errNoStream,
		`{"name":"stdout","text":"cut`: io.ErrUnexpectedEOF, `{"name":"stdout","text":"x"`: io.ErrUnexpectedEOF, "{\"name\":\"stdout\",\"text\":\"a\nb\"}": errNoStream,
		`{"name":"\q","text":"x"}`: errNoStream,
	} {
		if _, _, _, err := joined(t, strings.NewReader(in)); !errors.Is(err, want) {
			t.Errorf("%.40s: %v, want %v", in, err, want)
		}
	}
}

func FuzzPieces(f *testing.F) {
	f.Add([]byte(`{"name":"stdout","text":"a\u00e4\ud83d\ude00\n"}`), 3)
	f.Fuzz(func(t *testing.T, content []byte, at int) {
		in := io.Reader(strings.NewReader(string(content)))
		if at > 0 && at < len(content) {
			in = io.MultiReader(strings.NewReader(string(content[:at])), strings.NewReader(string(content[at:])))
		}
		var out strings.Builder
		if err := pieces(in, func(_, piece []byte) error { out.Write(piece); return nil }); err != nil {
			return
		}
		// What was taken apart is a JSON string again, if the content was JSON at all.
		if json.Valid(content) && !json.Valid([]byte(`"`+out.String()+`"`)) {
			t.Fatalf("%q came out as %q", content, out.String())
		}
	})
}
