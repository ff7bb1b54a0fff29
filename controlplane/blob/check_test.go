package blob_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/postern-dev/postern/controlplane/blob"
	"github.com/postern-dev/postern/proto"
)

// TestCheckSays: what S3 servers answer is said in one line of ours. What a real one answers
// to some of these mistakes is in TestCheck, with make s3-test.
func TestCheckSays(t *testing.T) {
	for _, kv := range []string{"AWS_ACCESS_KEY_ID=id", "AWS_SECRET_ACCESS_KEY=hush", "AWS_EC2_METADATA_DISABLED=true", "AWS_MAX_ATTEMPTS=1", "AWS_CONFIG_FILE=/dev/null", "AWS_SHARED_CREDENTIALS_FILE=/dev/null"} {
		name, value, _ := strings.Cut(kv, "=")
		t.Setenv(name, value)
	}
	for _, c := range []struct {
		method, code string // the first request with the method gets the code
		status       int
		want         proto.Code
		says         string
	}{
		{"PUT", "NoSuchBucket", 404, proto.CodeInvalid, "there is no such bucket"},
		{"PUT", "InvalidAccessKeyId", 403, proto.CodeInvalid, "refuses the credentials (InvalidAccessKeyId)"},
		{"PUT", "ExpiredToken", 400, proto.CodeInvalid, "refuses the credentials (ExpiredToken)"},
		{"PUT", "AccessDenied", 403, proto.CodeInvalid, "can't be written to: permission denied"},
		{"GET", "AccessDenied", 403, proto.CodeInvalid, "can't be read: permission denied"},
		{"DELETE", "AccessDenied", 403, proto.CodeInvalid, "can't be removed from: permission denied"},
		{"PUT", "AuthorizationHeaderMalformed", 400, proto.CodeInvalid, "another region"},
		{"PUT", "SlowDown", 503, proto.CodeUnavailable, "answers SlowDown"},
		{"GET", "", 200, proto.CodeUnavailable, "something else than was written"},
	} {
		t.Run(c.method+c.code, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				switch {
				case r.Method != c.method:
					w.Header().Set("ETag", `"x"`)
					if r.Method == http.MethodGet {
						fmt.Fprint(w, "Postern keeps chunks of files here.\n")
					}
				case c.code == "":
					fmt.Fprint(w, "a login page")
				default:
					w.WriteHeader(c.status)
					fmt.Fprintf(w, "<?xml version=\"1.0\"?><Error><Code>%s</Code><Message>two\nlines</Message></Error>", c.code)
				}
			}))
			defer server.Close()
			s, err := blob.Open(ctx, "s3://bucket?region=x&use_path_style=true&endpoint="+server.URL, blob.Config{Logger: slog.New(slog.DiscardHandler)})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close() //nolint:errcheck // it only checked
			err = s.Check(ctx)
			if proto.CodeOf(err) != c.want || !strings.HasPrefix(err.Error(), "--blob s3://bucket: ") || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v (%v), want %v and %q", err, proto.CodeOf(err), c.want, c.says)
			}
		})
	}
}

// TestCheckDirectory: nothing is left in a directory, one that is gone is an error, and one
// that is full is none.
func TestCheckDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "blob")
	s, err := blob.Open(ctx, dir, blob.Config{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close() //nolint:errcheck // it only checked
	if err := s.Check(ctx); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "v1", ".*")); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Check(ctx); err == nil || !strings.HasPrefix(err.Error(), "--blob "+dir+": it can't be written to") {
		t.Errorf("a file for a directory: %v", err)
	}
	s.Failing(&os.PathError{Op: "write", Path: dir, Err: syscall.ENOSPC})
	if err := s.Check(ctx); err != nil {
		t.Errorf("full: %v", err)
	}
}

// TestDirectoryBehindLink: the way to a directory may be a link, as systemd's DynamicUser
// makes one, and so may the directory itself.
func TestDirectoryBehindLink(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "private"), 0o700), os.Mkdir(filepath.Join(dir, "disk"), 0o700),
		os.Symlink("private", filepath.Join(dir, "state")), os.Symlink("../disk", filepath.Join(dir, "private", "other"))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"blob", "other"} {
		s, err := blob.Open(ctx, filepath.Join(dir, "state", name), blob.Config{Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(s.Check(ctx), s.Close()); err != nil {
			t.Error(err)
		}
	}
}
