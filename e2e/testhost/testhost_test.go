package testhost

import (
	"os"
	"strings"
	"testing"
)

func TestSourceLine(t *testing.T) {
	for text, want := range map[string]string{
		"deb http://mirror.example/debian/ bookworm main\n":                                "http://mirror.example/debian/",
		"deb [signed-by=/k arch=amd64] http://mirror.example/debian bookworm main\n":       "http://mirror.example/debian",
		"Types: deb\nURIs: http://mirror.example/debian/\nSuites: trixie\n":                "http://mirror.example/debian/",
		"# deb http://mirror.example/debian/ x\ndeb http://mirror.example/ubuntu/ noble\n": "",
	} {
		got := ""
		if m := sourceLine.FindStringSubmatch(text); m != nil {
			got = m[1]
		}
		if got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func TestBootRefusals(t *testing.T) {
	for _, name := range []string{"", "-x", "a/b", "A", strings.Repeat("x", 31)} {
		h, err := Boot(t.Context(), Config{Name: name, Suite: "trixie", Dir: t.TempDir()})
		want := "bad name"
		if os.Geteuid() != 0 {
			want = "needs root"
		}
		if h != nil || err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v", name, err)
		}
	}
}
