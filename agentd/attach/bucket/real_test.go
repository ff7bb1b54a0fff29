//go:build reals3

package bucket

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/s3test"
	"github.com/postern-dev/postern/proto"
)

func openReal(t *testing.T, s *s3test.Server, endpoint, prefix string) *Store {
	t.Helper()
	store, err := Open(t.Context(), Config{
		Name: "test", Bucket: "objects", Region: "us-east-1", Prefix: prefix, Endpoint: endpoint, PathStyle: true,
		Keys: func(context.Context) (Keys, error) { return Keys{Access: s.Key, Secret: s.Secret}, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

func TestReal(t *testing.T) {
	for _, kind := range []string{"store", "client"} {
		t.Run(kind, func(t *testing.T) {
			s := s3test.Start(t)
			dir := s.Bucket(t, "objects")
			store := openReal(t, s, s.URL, "below/here/")
			suite(t, remotes(t, store)[kind], func(key, content string) {
				if strings.Contains(key, "..") || strings.Contains(key, "//") || strings.Contains(key, "/./") || len(key) > 256 {
					key = "d/__0x2e" + "__" + key[2:3] // what this server cannot have as files; the library unescapes it
				}
				path := filepath.Join(dir, "below/here", key)
				if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

// TestRefusals: each mistake has a line of its own, and no secret in it.
func TestRefusals(t *testing.T) {
	s := s3test.Start(t)
	s.Bucket(t, "objects")
	list := func(change func(*Config)) error {
		cfg := Config{
			Name: "raw", Bucket: "objects", Region: "us-east-1", Endpoint: s.URL, PathStyle: true,
			Keys: func(context.Context) (Keys, error) { return Keys{Access: s.Key, Secret: s.Secret}, nil },
		}
		change(&cfg)
		store, err := Open(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		_, err = store.List(ctx, "", "", 1)
		return err
	}
	if err := list(func(*Config) {}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		change func(*Config)
		code   proto.Code
		says   string
	}{
		{"bucket", func(c *Config) { c.Bucket = "nowhere" }, proto.CodeSourceConfig, "no such bucket"},
		{"secret", func(c *Config) {
			c.Keys = func(context.Context) (Keys, error) { return Keys{Access: s.Key, Secret: "wrong-marked"}, nil }
		}, proto.CodeSourceCredentials, "refuses the credentials"},
		{"no key", func(c *Config) {
			c.Keys = func(context.Context) (Keys, error) { return Keys{}, errors.New("secret file /x is empty") }
		}, proto.CodeSourceCredentials, "/x is empty"},
		{"endpoint", func(c *Config) { c.Endpoint = "http://127.0.0.1:1" }, proto.CodeUnavailable, "connection refused"},
	} {
		err := list(c.change)
		if proto.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") ||
			strings.Contains(err.Error(), s.Secret) || strings.Contains(err.Error(), "wrong-marked") || !strings.HasPrefix(err.Error(), "bucket raw: ") {
			t.Errorf("%s: %v (%v)", c.name, err, proto.CodeOf(err))
		}
	}
}

// TestOneInTen: a bucket that fails one request in ten, by status, by hanging up before or
// in the midst of the answer, is a bucket that works.
func TestOneInTen(t *testing.T) {
	s := s3test.Start(t)
	s.Bucket(t, "objects")
	target, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	forward := httputil.NewSingleHostReverseProxy(target)
	rewrite := forward.Director
	forward.Director = func(r *http.Request) { rewrite(r) } // Host stays: it is signed
	var failed atomic.Int64
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if rand.IntN(10) > 0 {
			forward.ServeHTTP(w, r)
			return
		}
		failed.Add(1)
		switch rand.IntN(3) {
		case 0:
			io.Copy(io.Discard, r.Body) //nolint:errcheck // it is refused either way
			w.WriteHeader(http.StatusServiceUnavailable)
		case 1:
			panic(http.ErrAbortHandler)
		default:
			forward.ServeHTTP(&cutShort{ResponseWriter: w, left: 100_000}, r)
		}
	}))
	defer proxy.Close()
	store := openReal(t, s, proxy.URL, "")
	body := make([]byte, 3<<20)
	for i := range body {
		body[i] = byte(rand.Uint32())
	}
	ctx := t.Context()
	for i := range 40 {
		key := "d/" + string(rune('a'+i%26)) + string(rune('a'+i/26))
		o, err := store.Write(ctx, key, bytes.NewReader(body), int64(len(body)))
		if err != nil {
			t.Fatalf("write %d: %v", i, err)
		}
		var out bytes.Buffer
		if err := store.Read(ctx, key, o.ETag, 0, o.Size, &out); err != nil || !bytes.Equal(out.Bytes(), body) {
			t.Fatalf("read %d: %d bytes, %v", i, out.Len(), err)
		}
		if _, err := store.Copy(ctx, key+"2", key); err != nil {
			t.Fatalf("copy %d: %v", i, err)
		}
		if err := store.Delete(ctx, key); err != nil {
			t.Fatalf("delete %d: %v", i, err)
		}
	}
	if p, err := store.List(ctx, "d/", "", MaxPage); err != nil || len(p.Entries) != 40 {
		t.Errorf("%d entries, %v", len(p.Entries), err)
	}
	if failed.Load() < 10 {
		t.Errorf("only %d requests failed", failed.Load())
	}
	t.Logf("%d requests failed", failed.Load())
}

type cutShort struct {
	http.ResponseWriter
	left int
}

// Write implements io.Writer.
func (c *cutShort) Write(b []byte) (int, error) {
	if c.left -= len(b); c.left < 0 {
		panic(http.ErrAbortHandler)
	}
	return c.ResponseWriter.Write(b)
}
