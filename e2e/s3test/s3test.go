package s3test

import (
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/freeport"
)

// Server is a running S3 server. It ends with the test that started it.
type Server struct {
	// URL is its endpoint, http:// on loopback. Key and Secret are its only user's.
	URL, Key, Secret string

	root string
}

// Start runs the program that POSTERN_S3SERVER names on a free loopback port and waits until
// it listens, at most 30 seconds. Anything that fails ends the test.
func Start(t testing.TB) *Server {
	t.Helper()
	program := os.Getenv("POSTERN_S3SERVER")
	if program == "" {
		t.Fatal("POSTERN_S3SERVER is not set: run make s3-test")
	}
	address, err := freeport.Address()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s := &Server{URL: "http://" + address, Key: "posterntest", Secret: "a-secret-key-of-the-test", root: filepath.Join(dir, "objects")}
	sidecar := filepath.Join(dir, "attributes") // temporary directories need not have extended attributes
	for _, one := range []string{s.root, sidecar} {
		if err := os.Mkdir(one, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() //nolint:errcheck // the server has it
	cmd := exec.Command(program, "--port", address, "--quiet", "posix", "--sidecar", sidecar, s.root)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "ROOT_ACCESS_KEY_ID=" + s.Key, "ROOT_SECRET_ACCESS_KEY=" + s.Secret}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatalf("POSTERN_S3SERVER: %v", err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill() //nolint:errcheck // it may have ended
		cmd.Wait()         //nolint:errcheck // it was killed
		if said, err := os.ReadFile(log.Name()); t.Failed() && err == nil {
			t.Logf("the S3 server said:\n%s", said[max(0, len(said)-4000):])
		}
	})
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if c, err := net.Dial("tcp", address); err == nil {
			c.Close() //nolint:errcheck // it only asked
			return s
		}
		if time.Now().After(deadline) {
			said, _ := os.ReadFile(log.Name())
			t.Fatalf("the S3 server does not start: %s", said)
		}
	}
}

// Bucket makes a bucket and returns the directory that holds its objects, each a file under
// its own key.
func (s *Server) Bucket(t testing.TB, name string) string {
	t.Helper()
	dir := filepath.Join(s.root, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// Address is what --blob takes for a bucket, with objects under prefix, which ends in a slash
// or is empty.
func (s *Server) Address(bucket, prefix string) string {
	q := url.Values{"endpoint": {s.URL}, "region": {"us-east-1"}, "use_path_style": {"true"}}
	if prefix != "" {
		q.Set("prefix", prefix)
	}
	return "s3://" + bucket + "?" + q.Encode()
}

// Env are the variables that the AWS SDK takes the credentials from, and that keep it from
// looking anywhere else.
func (s *Server) Env() []string {
	return []string{
		"AWS_ACCESS_KEY_ID=" + s.Key, "AWS_SECRET_ACCESS_KEY=" + s.Secret, "AWS_EC2_METADATA_DISABLED=true",
		"AWS_CONFIG_FILE=/dev/null", "AWS_SHARED_CREDENTIALS_FILE=/dev/null",
	}
}
