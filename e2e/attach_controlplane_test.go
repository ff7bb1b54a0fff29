package e2e

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// rewriter is a program that writes on a mount: some files over and over, each time with another
// content and length, by close or by fsync, in place; and new files. What was acknowledged is in
// the list, with the content's hash. It ends when the stop file is there.
const rewriter = `
import hashlib, os, sys, time
target, listed, stop = sys.argv[1:]
log = open(listed, "w", buffering=1)
def content(name, generation):
    line = ("%s generation %d\n" % (name, generation)).encode()
    size = len(line) + generation * 7919 * 53 % (1200 << 10)
    return (line * (size // len(line) + 1))[:size]
generation = 0
while not os.path.exists(stop):
    generation += 1
    for i in range(3):
        name = "again%d" % i if i else "f%d" % generation
        data = content(name, generation)
        fd = os.open(os.path.join(target, name), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view):]
        if i == 1:
            os.fsync(fd)
        os.close(fd)
        print(name, generation, hashlib.sha256(data).hexdigest(), file=log)
    time.sleep(0.1)
`

// TestControlPlaneKills kills the control plane, which keeps its data in SQLite and in files, at
// random points under a load of writes through a mount: while it takes uploads, and while it starts; at some of them
// agentd, too, whose tries to connect would come to be half a minute apart when each tunnel lives for a moment only.
// Everything that was closed or synced must be there whole, the versions of each file must be a chain of
// contents that were written, in their order, and the control plane must start clean.
func TestControlPlaneKills(t *testing.T) {
	s, a, target := mounted(t)
	kills := 8
	if long {
		kills = 200
	}
	dir := t.TempDir()
	list, stop := filepath.Join(dir, "list"), filepath.Join(dir, "stop")
	var said strings.Builder
	writer := exec.Command("python3", "-c", rewriter, target, list, stop)
	writer.Stdout, writer.Stderr = &said, &said
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() { written <- writer.Wait() }()
	defer writer.Process.Kill() //nolint:errcheck // it has ended, unless the test failed

	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	begun := time.Now()
	starting, uploading, seen := 0, 0, ""
	token := readSecret(t, s.TokenFile)
	for i := range kills {
		if i%4 == 3 { // while it starts
			s.ControlPlane.Kill()
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(2+r.IntN(40))*time.Millisecond)
			if s.StartControlPlane(ctx) != nil {
				starting++
			}
			cancel()
		} else {
			// A new version has come, and the next are on their way.
			eventually(t, time.Minute, "the uploads to go on", func() error {
				is := etag(t, s.URL+"/api/v1/files/lab/again1", token)
				if is == "" || is == seen {
					return fmt.Errorf("again1 is %q still", is)
				}
				seen = is
				return nil
			})
			uploading++
			time.Sleep(time.Duration(r.IntN(300)) * time.Millisecond)
		}
		s.ControlPlane.Kill()
		if i%4 == 3 {
			a.Process.Kill()
		}
		startControlPlane(t, s)
		if i%4 == 3 {
			startAgent(t, a)
		}
		if i%20 == 19 {
			t.Logf("%d kills in %s", i+1, time.Since(begun).Round(time.Second))
		}
	}
	if err := os.WriteFile(stop, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-written:
		if err != nil {
			t.Fatalf("the writer: %v: %s", err, said.String())
		}
	case <-time.After(60 * time.Second):
		t.Fatal("the writer hangs")
	}
	t.Logf("%d kills while it took uploads, %d while it started, in %s", uploading, starting, time.Since(begun).Round(time.Second))
	allUploaded(t, a)

	// It stops and starts as if nothing had been; what it keeps is sound.
	if err := s.ControlPlane.Stop(40 * time.Second); err != nil {
		t.Error(err)
	}
	sound(t, filepath.Join(s.DataDir(), "controlplane.db"))
	before := len(s.ControlPlane.Log())
	startControlPlane(t, s)
	if said := s.ControlPlane.Log()[before:]; strings.Contains(said, "ERROR") || strings.Contains(said, "WARN") {
		t.Errorf("it did not start clean:\n%s", said)
	}

	// What was acknowledged: by file, the hash of each generation.
	text, err := os.ReadFile(list)
	if err != nil {
		t.Fatal(err)
	}
	generations, newest := map[string]map[string]int{}, map[string]string{}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) != 3 {
			t.Fatalf("a line of the list: %q", line)
		}
		generation, err := strconv.Atoi(f[1])
		if err != nil {
			t.Fatal(err)
		}
		if generations[f[0]] == nil {
			generations[f[0]] = map[string]int{}
		}
		generations[f[0]][f[2]], newest[f[0]] = generation, f[2]
	}
	if len(generations) < 10 {
		t.Errorf("only %d files: that was no load", len(generations))
	}
	hash := func(content []byte) string {
		sum := sha256.Sum256(content)
		return hex.EncodeToString(sum[:])
	}
	back := t.TempDir()
	must(t, s, "file", "get", "-r", "lab:/", back)
	for name, want := range newest {
		content, err := os.ReadFile(filepath.Join(back, name))
		if err != nil || hash(content) != want {
			t.Errorf("%s at the control plane: %v, %d bytes, which are generation %d of %d", name, err, len(content), generations[name][hash(content)], generations[name][want])
		}
	}
	if entries, err := os.ReadDir(back); err != nil || len(entries) != len(newest) {
		t.Errorf("%d files at the control plane, want %d (%v)", len(entries), len(newest), err)
	}
	// And on the host, read by another process.
	sums := shell(t, target, "sha256sum -- *")
	for line := range strings.Lines(sums) {
		if f := strings.Fields(line); len(f) != 2 || newest[f[1]] != f[0] {
			t.Errorf("on the host: %s", line)
		}
	}
	if n := strings.Count(sums, "\n"); n != len(newest) {
		t.Errorf("%d files on the host, want %d", n, len(newest))
	}
	for _, name := range []string{"again1", "again2"} {
		chained(t, s.URL, token, name, generations[name], mustJSON[[]fileVersion](t, s, "file", "history", "lab:/"+name))
	}
	if got := must(t, s, "file", "conflicts", "lab", "-o", "json"); got != "[]" {
		t.Errorf("conflicts although nobody else wrote: %s", got)
	}
	auditVerifies(t, s)
	succeeds(t, agentd(t, a, "umount", target))
}

// etag is that of a file at the control plane; "" if it is not there.
func etag(t *testing.T, url, token string) string {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodHead, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := c.Do(r)
	if err != nil {
		return ""
	}
	response.Body.Close()
	return response.Header.Get("ETag")
}

// fileVersion is what of `postern file history -o json` these tests look at.
type fileVersion struct {
	Version string `json:"version"`
	Base    string `json:"baseVersion"`
	Current bool   `json:"current"`
	Size    string `json:"size"`
}

// chained checks the versions of a file, the newest first: each was made of the one before, and is
// whole one of the generations that were written, in their order.
func chained(t *testing.T, url, token, name string, generations map[string]int, versions []fileVersion) {
	t.Helper()
	if len(versions) < 3 {
		t.Errorf("%s has %d versions: that was no load", name, len(versions))
	}
	after := len(generations) + 1
	for i, v := range versions {
		content := fetch(t, url+"/api/v1/files/lab/"+name+"?version="+v.Version, token)
		sum := sha256.Sum256(content)
		generation := generations[hex.EncodeToString(sum[:])]
		switch {
		case generation == 0 && len(content) > 0: // it may have been sent before it had content
			t.Errorf("version %s of %s is torn: %d bytes that nobody wrote", v.Version, name, len(content))
		case generation >= after:
			t.Errorf("version %s of %s is generation %d, and the one after it was %d", v.Version, name, generation, after)
		}
		if generation > 0 {
			after = generation
		}
		if v.Current != (i == 0) {
			t.Errorf("version %s of %s, the %d. of them, is current: %v", v.Version, name, i, v.Current)
		}
		// Of more than 100 some are dropped.
		if i+1 < len(versions) && len(versions) < 100 && v.Base != versions[i+1].Version {
			t.Errorf("version %s of %s was made of %q, the one before it is %s", v.Version, name, v.Base, versions[i+1].Version)
		}
	}
}

// sound checks a SQLite database that nobody has open.
func sound(t *testing.T, path string) {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var verdict string
	if err := db.QueryRowContext(t.Context(), "PRAGMA integrity_check").Scan(&verdict); err != nil || verdict != "ok" {
		t.Errorf("%s: %q, %v", path, verdict, err)
	}
	if err := db.QueryRowContext(t.Context(), "PRAGMA foreign_key_check").Scan(&verdict); err != sql.ErrNoRows {
		t.Errorf("%s has broken references: %q, %v", path, verdict, err)
	}
}
