//go:build reals3

package blob_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/controlplane/blob"
	"github.com/postern-dev/postern/e2e/s3test"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
)

// With this tag the tests of the package run on a real S3 server: see make s3-test.
func init() { place = realPlace }

func realPlace(t *testing.T) (where, dir string) {
	s := s3test.Start(t)
	setenv(t, s.Env())
	dir = s.Bucket(t, "chunks")
	return s.Address("chunks", "some/prefix/"), filepath.Join(dir, "some", "prefix")
}

func setenv(t *testing.T, env []string) {
	for _, kv := range env {
		name, value, _ := strings.Cut(kv, "=")
		t.Setenv(name, value)
	}
}

// TestCheck: an address that works passes and leaves nothing, and each mistake has a line of its own.
func TestCheck(t *testing.T) {
	s := s3test.Start(t)
	setenv(t, s.Env())
	dir := s.Bucket(t, "chunks")
	check := func(where string) error {
		opened, err := blob.Open(ctx, where, blob.Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer opened.Close() //nolint:errcheck // it only checked
		return opened.Check(ctx)
	}
	if err := check(s.Address("chunks", "p/")); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "p", "v1", ".check*")); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	wrong := func(name, where string, code proto.Code, says string) {
		t.Helper()
		err := check(where)
		if proto.CodeOf(err) != code || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), s.Secret) {
			t.Errorf("%s: %v (%v), want %v and %q", name, err, proto.CodeOf(err), code, says)
		}
	}
	wrong("bucket", s.Address("nowhere", ""), proto.CodeInvalid, "--blob s3://nowhere: there is no such bucket")
	gone := *s
	gone.URL = "http://127.0.0.1:1"
	wrong("endpoint", gone.Address("chunks", ""), proto.CodeUnavailable, "connection refused")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "another")
	wrong("secret", s.Address("chunks", ""), proto.CodeInvalid, "refuses the credentials (SignatureDoesNotMatch)")
	t.Setenv("AWS_ACCESS_KEY_ID", "nobody")
	wrong("key", s.Address("chunks", ""), proto.CodeInvalid, "refuses the credentials (")
	os.Unsetenv("AWS_ACCESS_KEY_ID")     //nolint:errcheck // Setenv puts it back
	os.Unsetenv("AWS_SECRET_ACCESS_KEY") //nolint:errcheck // Setenv puts it back
	wrong("no key", s.Address("chunks", ""), proto.CodeInvalid, "there are no credentials")
}

// TestBucketGone: a bucket that is away for a while is no reason to take its objects for lost
// or its garbage for removed.
func TestBucketGone(t *testing.T) {
	k := open(t, storetest.SQLite(t), "", time.Millisecond)
	good := chunk(6000)
	hash := k.put(k.a, good)
	bucket := filepath.Dir(filepath.Dir(k.dir))
	if err := os.Rename(bucket, bucket+".away"); err != nil {
		t.Fatal(err)
	}
	_, err := k.Get(ctx, k.org, k.a, hash)
	wantCode(t, err, proto.CodeUnavailable)
	_, err = k.Put(ctx, k.org, k.a, [][]byte{chunk(10)})
	wantCode(t, err, proto.CodeUnavailable)
	if missing, err := k.index.MissingChunks(ctx, k.org, k.a, hash, time.Now()); err != nil || len(missing) != 0 {
		t.Errorf("taken for damaged: %v, %v", missing, err)
	}
	time.Sleep(5 * time.Millisecond)
	if n, err := k.Collect(ctx); err == nil || n != 0 {
		t.Errorf("collected %d, %v", n, err)
	}
	if err := os.Rename(bucket+".away", bucket); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Collect(ctx); err != nil {
		t.Error(err)
	}
	if left := k.files(); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}
