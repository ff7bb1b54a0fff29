package e2e

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/stack"
)

// litmusFails are the tests of litmus, the conformance suite of WebDAV servers, that do not pass, and why.
var litmusFails = map[string]string{
	"props/propfind_invalid2":        "golang.org/x/net/webdav takes an invalid namespace for a valid one",
	"locks/fail_complex_cond_put":    "golang.org/x/net/webdav looks at one condition alone",
	"locks/lock_shared":              "there are exclusive locks alone, which is what RFC 4918 asks for",
	"locks/double_sharedlock":        "as lock_shared",
	"locks/notowner_modify (shared)": "as lock_shared",
}

// TestWebDAV runs litmus against a workspace, and what it does not look at.
func TestWebDAV(t *testing.T) {
	s := newStack(t, stack.Options{})
	must(t, s, "workspace", "create", "w")
	raw, err := os.ReadFile(s.TokenFile)
	if err != nil {
		t.Fatal(err)
	}
	token := strings.TrimSpace(string(raw))

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	litmus := exec.CommandContext(ctx, "litmus", "-k", s.URL+"/dav/w/", "anybody", token)
	litmus.Dir = t.TempDir() // it writes a log
	out, err := litmus.CombinedOutput()
	if _, failed := err.(*exec.ExitError); err != nil && !failed { //nolint:errorlint // as os/exec gives it
		t.Fatalf("%v: %s", err, out)
	}
	suite := ""
	passed := 0
	for line := range strings.SplitSeq(string(out), "\n") {
		line = line[strings.LastIndexByte(line, '\r')+1:]
		if m := regexp.MustCompile("^-> running `(.*)':").FindStringSubmatch(line); m != nil {
			suite = m[1]
		}
		m := regexp.MustCompile(`^ ?[0-9]+\. (\w+)\.* (pass|FAIL)`).FindStringSubmatch(line)
		switch {
		case m == nil:
		case m[2] == "pass":
			passed++
		case litmusFails[suite+"/"+m[1]] == "":
			t.Errorf("litmus %s: %s", suite, line)
		}
	}
	if passed < 65 {
		t.Errorf("litmus: %d tests passed:\n%s", passed, out)
	}

	do := func(method, path, token string, body io.Reader, header ...string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, s.URL+path, body)
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			req.SetBasicAuth("me", token)
		}
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close() //nolint:errcheck // it was only read
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(text)
	}
	expect := func(want int, says, method, path, token string, body io.Reader, header ...string) {
		t.Helper()
		if got, text := do(method, path, token, body, header...); got != want || !strings.Contains(text, says) {
			t.Errorf("%s %s: %d %q, want %d and %q", method, path, got, text, want, says)
		}
	}
	content := bytes.Repeat([]byte("0123456789"), 500_000)
	expect(201, "", http.MethodPut, "/dav/w/file.bin", token, bytes.NewReader(content))
	if got := must(t, s, "file", "cat", "w:/file.bin"); got != string(content) {
		t.Errorf("%d bytes", len(got))
	}
	expect(206, "89012", http.MethodGet, "/dav/w/file.bin", token, nil, "Range", "bytes=1048578-1048582")
	expect(207, "<D:href>/dav/w/</D:href>", "PROPFIND", "/dav/", token, nil, "Depth", "1")
	expect(403, "propfind-finite-depth", "PROPFIND", "/dav/w/", token, nil)
	// A body that is cut off leaves what was there.
	cut := func() {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, s.URL+"/dav/w/file.bin", io.MultiReader(bytes.NewReader(content[:3<<20]), brokenReader{}))
		if err != nil {
			t.Fatal(err)
		}
		req.SetBasicAuth("me", token)
		req.ContentLength = 4 << 20
		if resp, err := http.DefaultClient.Do(req); err == nil {
			resp.Body.Close() //nolint:errcheck // it was only read
			t.Errorf("a body that broke got %s", resp.Status)
		}
	}
	cut()
	if got := must(t, s, "file", "history", "w:/file.bin", "-o", "json"); strings.Count(got, `"version"`) != 1 {
		t.Errorf("versions after a body that was cut off: %s", got)
	}
	// Who may not.
	expect(401, "no API token", http.MethodGet, "/dav/w/file.bin", "", nil)
	expect(401, "", http.MethodGet, "/dav/w/file.bin", "pst1_wrong", nil)
	viewer := must(t, s, "token", "create", "looker", "--role", "viewer")
	expect(200, "", http.MethodGet, "/dav/w/file.bin", viewer, nil)
	expect(403, "needs analyst", http.MethodPut, "/dav/w/file.bin", viewer, strings.NewReader("x"))
	expect(403, "needs analyst", http.MethodDelete, "/dav/w/file.bin", viewer, nil)
	fields := strings.Fields(must(t, s, "org", "create", "other"))
	expect(404, "", http.MethodGet, "/dav/w/file.bin", fields[len(fields)-1], nil)
	expect(404, "", "PROPFIND", "/dav/w/", fields[len(fields)-1], nil, "Depth", "1")
	// The quota.
	must(t, s, "workspace", "set", "w", "--quota", "6MiB")
	expect(507, "quota", http.MethodPut, "/dav/w/more.bin", token, bytes.NewReader(bytes.Repeat([]byte("q"), 3<<20)))
	expect(204, "", http.MethodDelete, "/dav/w/file.bin", token, nil)
	if got := must(t, s, "file", "trash", "w"); !strings.Contains(got, "/file.bin") {
		t.Errorf("trash: %s", got)
	}
	auditVerifies(t, s)
}

// brokenReader fails.
type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, io.ErrNoProgress }
