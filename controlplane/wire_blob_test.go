package main

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto"
)

// simulatedS3 is as much of S3 as a check needs: objects of one bucket, any credentials.
type simulatedS3 struct {
	mu      sync.Mutex
	objects map[string]string
	down    int // the status that everything is answered with; 0: none
}

// ServeHTTP implements http.Handler.
func (s *simulatedS3) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	body, err := io.ReadAll(r.Body)
	content, there := s.objects[r.URL.Path]
	switch {
	case s.down != 0:
		w.WriteHeader(s.down)
	case err != nil:
		w.WriteHeader(http.StatusBadRequest)
	case r.Method == http.MethodPut:
		s.objects[r.URL.Path] = string(body)
		w.Header().Set("ETag", `"x"`)
	case !there:
		w.WriteHeader(http.StatusNotFound)
	case r.Method == http.MethodDelete:
		delete(s.objects, r.URL.Path)
		w.WriteHeader(http.StatusNoContent)
	default:
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(content))
	}
}

// TestStartWithoutBlob: an object store that is known and away is no reason to stay down; one
// that never worked, or refuses, is.
func TestStartWithoutBlob(t *testing.T) {
	s3 := &simulatedS3{objects: map[string]string{}}
	server := httptest.NewServer(s3)
	defer server.Close()
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null",
		"AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_MAX_ATTEMPTS": "1",
	} {
		t.Setenv(name, value)
	}
	where := "s3://bucket?region=us-east-1&use_path_style=true&request_checksum_calculation=when_required&endpoint=" + server.URL
	o := Options{Data: t.TempDir(), Listen: "127.0.0.1:0", Blob: where}
	start := func() (away bool, err error) {
		t.Helper()
		s, err := NewServer(t.Context(), o, slog.New(slog.DiscardHandler))
		if err != nil {
			return false, err
		}
		away = s.blobAway
		return away, s.Close()
	}
	set := func(status int) {
		s3.mu.Lock()
		defer s3.mu.Unlock()
		s3.down = status
	}
	set(http.StatusServiceUnavailable)
	if _, err := start(); proto.CodeOf(err) != proto.CodeUnavailable {
		t.Errorf("a first start without an answer: %v", err)
	}
	set(0)
	if away, err := start(); away || err != nil {
		t.Fatalf("a first start: %v, %v", away, err)
	}
	set(http.StatusServiceUnavailable)
	if away, err := start(); !away || err != nil {
		t.Errorf("without an answer: %v, %v", away, err)
	}
	set(http.StatusForbidden)
	if _, err := start(); proto.CodeOf(err) != proto.CodeInvalid {
		t.Errorf("refused: %v", err)
	}
	set(http.StatusServiceUnavailable)
	o.Blob = where + "&prefix=other/"
	if _, err := start(); proto.CodeOf(err) != proto.CodeUnavailable {
		t.Errorf("another place without an answer: %v", err)
	}
}
