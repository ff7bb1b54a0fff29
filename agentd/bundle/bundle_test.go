package bundle

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestText(t *testing.T) {
	r := NewRedactor("literal-canary", "lit", "literal-canary-longer\n")
	for name, test := range map[string]struct{ text, want string }{
		"literal":      {"a literal-canary b", "a redacted b"},
		"longer one":   {"a literal-canary-longer b", "a redacted b"},
		"too short":    {"lit by", "lit by"},
		"api token":    {"token pst1_abcdefghijklmnopqrst used", "token pst1_redacted used"},
		"key":          {"prk1_abcdefghijklmnopqrst", "prk1_redacted"},
		"vault":        {"hvs.CAESIabcdefghijklm", "hvs.redacted"},
		"url":          {"proxy http://user:pw@proxy:3128/x", "proxy http://redactedproxy:3128/x"},
		"dsn":          {"host=db password=hunter2 user=x", "host=db password=redacted user=x"},
		"quoted":       {`{"password": "hun\"ter2", "a": 1}`, `{"password": redacted, "a": 1}`},
		"header":       {"Authorization: Bearer abcdefghijkl", "Authorization: redacted"},
		"pem":          {"-----BEGIN EC PRIVATE KEY-----\nMHcC\n-----END EC PRIVATE KEY-----\n", "-----BEGIN EC PRIVATE KEY-----redacted\n"},
		"nothing here": {"link up tunnel=abc remote=192.0.2.1:443", "link up tunnel=abc remote=192.0.2.1:443"},
	} {
		if got := r.Text(test.text); got != test.want {
			t.Errorf("%s: got %q, want %q", name, got, test.want)
		}
	}
}

func TestYAML(t *testing.T) {
	r := NewRedactor()
	got, err := r.YAML([]byte(`# canary-comment
url: https://canary@cp.example.com
sources:
  - name: shop # canary-line
    engine: postgres
    dsn: host=canary
    password: 424242
    policy: {mode: read-only, max_rows: 10, mask: [{columns: ["*.canary"], with: hash}]}
brand_new_key: canary
anchored: &a {token: canary}
again: *a
`))
	if err != nil {
		t.Fatal(err)
	}
	text := string(got)
	for _, want := range []string{"name: shop", "engine: postgres", "mode: read-only", "max_rows: 10", "with: hash", "brand_new_key: redacted"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in:\n%s", want, text)
		}
	}
	for _, secret := range []string{"canary", "424242"} {
		if strings.Contains(text, secret) {
			t.Errorf("%q is in:\n%s", secret, text)
		}
	}
	if _, err := r.YAML([]byte("a: [canary")); err == nil || strings.Contains(err.Error(), "canary") {
		t.Errorf("no YAML: got %v", err)
	}
}

func TestWriter(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "b.tar.gz")
	w, err := Create(path, NewRedactor())
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Text("a.txt", "text"); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if _, err := Create(path, NewRedactor()); err == nil || !strings.Contains(err.Error(), "there already") {
		t.Errorf("over another: got %v", err)
	}
	w, err = Create(filepath.Join(dir, "c.tar.gz"), NewRedactor())
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Abandon(); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}
