package workspace_test

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// killEnv has what the process is told that TestKill kills.
const killEnv = "POSTERN_TEST_KILL_FILES"

// killed is a control plane's files, for a process of their own.
type killed struct {
	Store store.Config
	Dir   string // of objects; keys lie beside it
	Where string // the object store; "": Dir
}

// child stands for testing.TB in a process that has no test: what fails ends it.
type child struct{ testing.TB }

// Helper implements testing.TB.
func (child) Helper() {}

// Cleanup implements testing.TB: nothing of the process is kept.
func (child) Cleanup(func()) {}

// Fatal implements testing.TB.
func (child) Fatal(args ...any) {
	fmt.Fprintln(os.Stderr, args...)
	os.Exit(3)
}

// Fatalf implements testing.TB.
func (c child) Fatalf(format string, args ...any) { c.Fatal(fmt.Sprintf(format, args...)) }

// told is a content that says of itself whether it is whole.
func told(body string) string {
	sum := sha256.Sum256([]byte(body))
	return hex.EncodeToString(sum[:]) + body
}

func whole(content string) bool {
	return len(content) >= 64 && told(content[64:])[:64] == content[:64]
}

// storeUntilKilled stores files, new ones and new versions, and removes some, from several
// goroutines while everything is tidied up all the time. It prints a line for each thing that was
// acknowledged: "put PATH VERSION HASH" or "gone PATH".
func storeUntilKilled(arg string) {
	var what killed
	t := child{}
	if err := json.Unmarshal([]byte(arg), &what); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(ctx, what.Store)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.EnsureDefaultOrganization(ctx, time.Now()); err != nil {
		t.Fatal(err)
	}
	k := &kit{t: t, store: s, dir: what.Dir, org: store.DefaultOrganizationID, grace: time.Second}
	k.start(what.Where, slog.New(slog.DiscardHandler))
	var mu sync.Mutex
	say := func(words ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Println(words...)
	}
	for g := range 3 {
		go func() {
			for {
				path := fmt.Sprintf("/g%d/f%d", g, rand.IntN(20))
				if rand.IntN(8) == 0 {
					req, err := http.NewRequest(http.MethodDelete, k.server.URL+"/api/v1/files/w"+path, nil)
					if err != nil {
						t.Fatal(err)
					}
					resp, err := k.client(nil).Do(req)
					if err != nil {
						t.Fatal(err)
					}
					resp.Body.Close() //nolint:errcheck // its status is what counts
					if resp.StatusCode < 300 {
						say("gone", path)
					}
					continue
				}
				content := told(noise(1 + rand.IntN(3*filechunk.Size/2)))
				req, err := http.NewRequest(http.MethodPut, k.server.URL+"/api/v1/files/w"+path, strings.NewReader(content))
				if err != nil {
					t.Fatal(err)
				}
				resp, err := k.client(nil).Do(req)
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close() //nolint:errcheck // its status is what counts
				// A store that took longer than the grace of chunks is refused: not acknowledged, so nothing is promised.
				if resp.StatusCode == http.StatusCreated {
					say("put", path, resp.Header.Get("X-Postern-Version"), content[:64])
				}
			}
		}()
	}
	for {
		if err := k.s.Keep(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := k.blobs.Collect(ctx); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// killRounds is how often each combination is killed.
const killRounds = 6

// TestKill: after kill -9 at random points every acknowledged version is there, whole, what
// is counted is what is there, and nothing is left of what is given up.
func TestKill(t *testing.T) {
	for name, config := range map[string]func(testing.TB) store.Config{
		"sqlite": func(t testing.TB) store.Config {
			return store.Config{SQLitePath: filepath.Join(storetest.Dir(t), "postern.db")}
		},
		"postgres": func(t testing.TB) store.Config { cfg, _ := storetest.PostgresConfig(t); return cfg },
	} {
		t.Run(name, func(t *testing.T) {
			what := killed{Store: config(t), Dir: filepath.Join(storetest.Dir(t), "blob")}
			if killPlace != nil {
				what.Where, what.Dir = killPlace(t)
			}
			testKill(t, what)
		})
	}
}

// killPlace is another object store than a directory, of which the objects are files: see kill_real_test.go.
var killPlace func(t *testing.T) (where, dir string)

func testKill(t *testing.T, what killed) {
	arg, err := json.Marshal(what)
	if err != nil {
		t.Fatal(err)
	}
	versions := map[string]string{} // path and version -> hash
	newest := map[string]string{}   // path -> the hash that was acknowledged last, "" if it was removed
	for round := range killRounds {
		stop := 5 + rand.IntN(25)
		n := runUntilKilled(t, string(arg), stop, func(f []string) {
			if f[0] == "gone" {
				newest[f[1]] = ""
				for at := range versions { // of a file that is in the trash, or not any more
					if strings.HasPrefix(at, f[1]+"?") {
						delete(versions, at)
					}
				}
				return
			}
			versions[f[1]+"?version="+f[2]], newest[f[1]] = f[3], f[3]
		})
		if n < stop {
			t.Fatalf("round %d: only %d things were done", round, n)
		}
	}
	s := storetest.Open(t, what.Store)
	k := &kit{t: t, store: s, dir: what.Dir, org: store.DefaultOrganizationID, grace: time.Millisecond}
	k.open(what.Where)
	time.Sleep(5 * time.Millisecond)
	if _, err := k.blobs.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	missing := 0
	for at, want := range versions {
		content, resp := k.get("w", at)
		path, _, _ := strings.Cut(at, "?")
		// What the last moment before a kill did to this file was perhaps not told.
		if resp.StatusCode == http.StatusNotFound && newest[path] != "" {
			missing++
			continue
		}
		if resp.StatusCode != http.StatusOK || !whole(content) || content[:64] != want {
			t.Errorf("%s: %s, %d bytes, want %s", at, resp.Status, len(content), want)
		}
	}
	// A removal that was done and not told, at most one for each goroutine and round, takes a
	// file's versions along.
	if files := len(newest); missing > 0 && missing > len(versions)/2 {
		t.Errorf("%d of %d versions of %d files are missing", missing, len(versions), files)
	}
	for path, content := range k.world("w") {
		if !strings.HasSuffix(path, "/") && !whole(content) {
			t.Errorf("%s is torn: %d bytes", path, len(content))
		}
	}
	checkCounts(t, k, "w")
	t.Logf("%d versions survived", len(versions)-missing)
	if _, err := k.files().DeleteWorkspace(ctx, connect.NewRequest(&posternv1.DeleteWorkspaceRequest{Workspace: "w"})); err != nil {
		t.Fatal(err)
	}
	left := -1
	for range 50 {
		if err := k.s.Keep(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := k.blobs.Collect(ctx); err != nil {
			t.Fatal(err)
		}
		// Temporary files of writers that were killed go an hour later.
		stranded, err := filepath.Glob(filepath.Join(k.dir, "v1", "*", "*", "*.tmp"))
		if err != nil {
			t.Fatal(err)
		}
		if left = k.objects() - len(stranded); left == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("%d objects are left of a workspace that was deleted", left)
}

// runUntilKilled runs the process, kills it some time after it has said so many things, and
// returns how many it said.
func runUntilKilled(t *testing.T, arg string, stop int, each func([]string)) (n int) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), killEnv+"="+arg)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	hangs := time.AfterFunc(2*time.Minute, func() { _ = cmd.Process.Kill() })
	defer hangs.Stop()
	var killer sync.WaitGroup
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) != 2 && len(f) != 4 || len(f) == 4 && len(f[3]) != 64 {
			break // cut by the kill
		}
		each(f)
		if n++; n == stop {
			killer.Go(func() {
				time.Sleep(time.Duration(rand.IntN(30)) * time.Millisecond)
				_ = cmd.Process.Kill()
			})
		}
	}
	killer.Wait()
	_ = cmd.Wait() // it was killed
	return n
}
