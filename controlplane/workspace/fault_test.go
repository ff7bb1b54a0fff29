package workspace_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/s3test"
	"github.com/postern-dev/postern/e2e/simulateds3"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// TestSimulatedBucketFailsOneInTen writes through the file service while the bucket fails one
// request in ten; make s3-test does the same with a real S3 server.
func TestSimulatedBucketFailsOneInTen(t *testing.T) {
	server := simulateds3.Start(t, "files")
	setEnv(t, server.Env())
	faults := s3test.NewFaults(t, server.URL, 10)
	failingBucket(t, storetest.SQLite(t), faults, "s3://files?region=us-east-1&use_path_style=true&prefix=p/&endpoint="+url.QueryEscape(faults.URL), 8)
}

func setEnv(t *testing.T, env []string) {
	t.Helper()
	for _, kv := range env {
		name, value, _ := strings.Cut(kv, "=")
		t.Setenv(name, value)
	}
}

// failingBucket lets writers make versions, of several chunks, one or none. Each that was
// acknowledged is there and whole afterwards, in the order of the acknowledgements, and is also
// read while the bucket fails. Once it no longer does, nothing is missing or in the way.
func failingBucket(t *testing.T, s *store.Store, faults *s3test.Faults, where string, rounds int) {
	const writers = 4
	k := newKit(t, s)
	k.close()
	k.open(where)
	k.put("w", "/begin", "x") // makes the workspace
	type acknowledged struct {
		version string
		sum     [sha256.Size]byte
	}
	var mu sync.Mutex
	done := map[string][]acknowledged{}
	refused := 0
	var wait sync.WaitGroup
	for writer := range writers {
		wait.Go(func() {
			path := fmt.Sprintf("/d/%d", writer)
			for round := range rounds {
				content := noise([]int{filechunk.Size + 4097, 300_000, 20_000, 100}[round%4]) + fmt.Sprint(writer, round)
				req, err := http.NewRequest(http.MethodPut, k.server.URL+"/api/v1/files/w"+path, strings.NewReader(content))
				if err != nil {
					t.Error(err)
					return
				}
				resp, err := k.client(nil).Do(req)
				if err != nil {
					t.Error(err)
					return
				}
				said, err := io.ReadAll(resp.Body)
				resp.Body.Close() //nolint:errcheck // read
				mu.Lock()
				switch {
				case err != nil:
					t.Error(err)
				case resp.StatusCode == http.StatusCreated:
					done[path] = append(done[path], acknowledged{resp.Header.Get("X-Postern-Version"), sha256.Sum256([]byte(content))})
				case resp.StatusCode < 500 || bytes.Contains(said, []byte("internal")):
					t.Errorf("%s: %s: %s", path, resp.Status, said) // what the bucket does is UNAVAILABLE
				default:
					refused++
				}
				mu.Unlock()
			}
		})
	}
	wait.Wait()
	verify := func(while string) {
		t.Helper()
		n := 0
		for path, all := range done {
			last := ""
			for _, a := range all {
				n++
				if len(a.version) < len(last) || len(a.version) == len(last) && a.version <= last {
					t.Errorf("%s: version %s came after %s", path, a.version, last)
				}
				last = a.version
				if got, resp := k.get("w", path+"?version="+a.version); resp.StatusCode != http.StatusOK || sha256.Sum256([]byte(got)) != a.sum {
					t.Errorf("%s: version %s of %s: %s, %d bytes", while, a.version, path, resp.Status, len(got))
				}
			}
			versions, err := k.files().ListFileVersions(ctx, connect.NewRequest(&posternv1.FileRequest{Workspace: "w", Path: []byte(path)}))
			if err != nil || len(versions.Msg.Versions) != len(all) {
				t.Errorf("%s: %d versions were acknowledged: there are %v, %v", path, len(all), versions, err)
			}
		}
		if n < writers*rounds*3/4 {
			t.Errorf("%d of %d writes were acknowledged: one request in ten must not refuse that many", n, writers*rounds)
		}
	}
	verify("while it fails")
	requests, failed := faults.Counts()
	if failed < int64(writers) {
		t.Errorf("%d of %d requests failed: nothing was shown", failed, requests)
	}
	faults.Every(0)
	verify("afterwards")
	// What the refused writes left is no one's, and goes; what was acknowledged stays.
	time.Sleep(2 * time.Millisecond)
	if _, err := k.blobs.Collect(ctx); err != nil {
		t.Error(err)
	}
	verify("after a collection")
	t.Logf("%d requests, %d failed, %d writes refused", requests, failed, refused)
}
