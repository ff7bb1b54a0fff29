package simulateds3

import (
	"bufio"
	"crypto/md5"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// maxBody bounds an object, in bytes.
const maxBody = 64 << 20

// Server is a simulated object store with one bucket. It ends with the test that started it.
type Server struct {
	// URL is its endpoint, http:// on loopback; path style alone.
	URL string
	// Bucket is its only bucket; Key and Secret are its only user's, until Rotate.
	Bucket, Key, Secret string

	mu      sync.Mutex
	objects map[string]object
}

type object struct {
	content []byte
	etag    string
	made    time.Time
}

// Start starts a server with an empty bucket.
func Start(t testing.TB, bucket string) *Server {
	s := &Server{Bucket: bucket, Key: "SIMULATEDKEY", Secret: "a-simulated-secret-key", objects: map[string]object{}}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	s.URL = server.URL
	return s
}

// Env is what the AWS SDK needs in the environment for the server's user.
func (s *Server) Env() []string {
	return []string{"AWS_ACCESS_KEY_ID=" + s.Key, "AWS_SECRET_ACCESS_KEY=" + s.Secret}
}

// Put makes an object.
func (s *Server) Put(key, content string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.put(key, []byte(content))
}

// Rotate gives the server's user another key and secret; the ones before are refused.
func (s *Server) Rotate(key, secret string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.Key, s.Secret = key, secret
}

// Has tells whether an object has this content.
func (s *Server) Has(key, content string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	o, found := s.objects[key]
	return found && string(o.content) == content
}

// Count is how many objects there are.
func (s *Server) Count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.objects)
}

func (s *Server) put(key string, content []byte) object {
	sum := md5.Sum(content)
	o := object{content, `"` + hex.EncodeToString(sum[:]) + `"`, time.Now().UTC()}
	s.objects[key] = o
	return o
}

func fail(w http.ResponseWriter, r *http.Request, status int, code string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>simulated</Message></Error>`, code) //nolint:errcheck // the caller sees it
	}
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	user := "Credential=" + s.Key + "/"
	s.mu.Unlock()
	if !strings.Contains(r.Header.Get("Authorization"), user) {
		fail(w, r, http.StatusForbidden, "InvalidAccessKeyId")
		return
	}
	bucket, key, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	if bucket != s.Bucket {
		fail(w, r, http.StatusNotFound, "NoSuchBucket")
		return
	}
	q := r.URL.Query()
	var body []byte
	if r.Method == http.MethodPut {
		var err error
		if body, err = bodyOf(r); err != nil {
			fail(w, r, http.StatusBadRequest, "IncompleteBody")
			return
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o, found := s.objects[key]
	switch {
	case q.Has("uploads") || q.Has("uploadId") || r.Header.Get("X-Amz-Copy-Source") != "":
		fail(w, r, http.StatusNotImplemented, "NotImplemented")
	case key == "" && r.Method == http.MethodGet:
		s.list(w, q.Get("prefix"), q.Get("delimiter"), q.Get("continuation-token"), q.Get("max-keys"))
	case key == "":
		w.WriteHeader(http.StatusOK) // HeadBucket
	case r.Method == http.MethodPut && (r.Header.Get("If-None-Match") == "*" && found):
		fail(w, r, http.StatusPreconditionFailed, "PreconditionFailed")
	case r.Method == http.MethodPut:
		w.Header().Set("ETag", s.put(key, body).etag)
	case r.Method == http.MethodDelete:
		delete(s.objects, key)
		w.WriteHeader(http.StatusNoContent)
	case !found:
		fail(w, r, http.StatusNotFound, "NoSuchKey")
	default:
		w.Header().Set("ETag", o.etag)
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", o.made, strings.NewReader(string(o.content)))
	}
}

// bodyOf is a body, without the SDK's framing if it has that.
func bodyOf(r *http.Request) ([]byte, error) {
	limited := io.LimitReader(r.Body, maxBody)
	if !strings.HasPrefix(r.Header.Get("X-Amz-Content-Sha256"), "STREAMING-") {
		all, err := io.ReadAll(limited)
		if err == nil && r.ContentLength >= 0 && int64(len(all)) != r.ContentLength {
			err = io.ErrUnexpectedEOF
		}
		return all, err
	}
	var all []byte
	in := bufio.NewReader(limited)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return nil, err
		}
		digits, _, _ := strings.Cut(strings.TrimSpace(line), ";")
		n, err := strconv.ParseUint(digits, 16, 31)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return all, nil
		}
		part := make([]byte, n+2)
		if _, err := io.ReadFull(in, part); err != nil {
			return nil, err
		}
		if string(part[n:]) != "\r\n" {
			return nil, errors.New("a part without an end")
		}
		all = append(all, part[:n]...)
	}
}

type listing struct {
	XMLName               xml.Name `xml:"ListBucketResult"`
	Name, Prefix          string
	KeyCount, MaxKeys     int
	IsTruncated           bool
	NextContinuationToken string `xml:",omitempty"`
	Contents              []listed
	CommonPrefixes        []common
}

type listed struct {
	Key, LastModified, ETag string
	Size                    int
}

type common struct{ Prefix string }

// list answers ListObjectsV2.
func (s *Server) list(w http.ResponseWriter, prefix, delimiter, token, most string) {
	l := listing{Name: s.Bucket, Prefix: prefix, MaxKeys: 1000}
	if n, err := strconv.Atoi(most); err == nil && n > 0 {
		l.MaxKeys = min(n, 1000)
	}
	var keys []string
	for key := range s.objects {
		if strings.HasPrefix(key, prefix) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	last := ""
	for _, key := range keys {
		shown, directory := key, false
		if delimiter != "" {
			if head, _, found := strings.Cut(key[len(prefix):], delimiter); found {
				shown, directory = prefix+head+delimiter, true
			}
		}
		if shown <= token || shown == last {
			continue
		}
		if l.KeyCount == l.MaxKeys {
			l.IsTruncated, l.NextContinuationToken = true, last
			break
		}
		last = shown
		l.KeyCount++
		if directory {
			l.CommonPrefixes = append(l.CommonPrefixes, common{shown})
			continue
		}
		o := s.objects[key]
		l.Contents = append(l.Contents, listed{key, o.made.Format(time.RFC3339), o.etag, len(o.content)})
	}
	w.Header().Set("Content-Type", "application/xml")
	xml.NewEncoder(w).Encode(l) //nolint:errcheck // the caller sees it
}
