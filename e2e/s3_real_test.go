//go:build reals3

package e2e

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/s3test"
	"github.com/postern-dev/postern/e2e/stack"
)

// TestRealS3 keeps a workspace in a bucket of a real S3 server, the program that
// POSTERN_S3SERVER names: see make s3-test.
func TestRealS3(t *testing.T) {
	server := s3test.Start(t)
	objects := server.Bucket(t, "postern")
	s := newStack(t, stack.Options{Args: []string{"--blob", server.Address("postern", "files/")}, Env: server.Env()})
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	if err := os.MkdirAll(filepath.Join(tree, "sub", "empty"), 0o755); err != nil {
		t.Fatal(err)
	}
	secret := bytes.Repeat([]byte("a line that the bucket must not show\n"), 10_000)
	for i := range 40 { // rows, single chunks and several
		content := append(slices.Clip(secret[:i*9000]), byte(i))
		if err := os.WriteFile(filepath.Join(tree, "sub", fmt.Sprint(i)), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	long := make([]byte, 5<<20+17)
	rand.Read(long) //nolint:errcheck // it never fails
	if err := os.WriteFile(filepath.Join(tree, "long"), long, 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, s, "file", "put", "-r", tree, "w:/")
	must(t, s, "file", "get", "-r", "w:/tree", filepath.Join(dir, "back"))
	if describe(t, filepath.Join(dir, "back")) != describe(t, tree) {
		t.Error("what came back differs")
	}
	stored := func() (n int, bytes int64) {
		err := filepath.WalkDir(objects, func(_ string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				if info, err := d.Info(); err == nil {
					n++
					bytes += info.Size()
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return n, bytes
	}
	if n, _ := stored(); n < 40 {
		t.Errorf("only %d objects in the bucket", n)
	}
	if found, err := exec.Command("grep", "-rlF", "the bucket must not show", objects).Output(); err == nil || len(found) > 0 {
		t.Errorf("in the clear: %s", found)
	}
	if left, err := filepath.Glob(filepath.Join(s.DataDir(), "blob", "*")); err != nil || len(left) != 0 {
		t.Errorf("beside the bucket: %v, %v", left, err)
	}
	must(t, s, "file", "rm", "-r", "w:/tree")
	postern(t, s, "file", "cat", "w:/tree/long").said(t, 4, "not found")
	must(t, s, "file", "restore", "w:/tree")
	must(t, s, "file", "get", "w:/tree/long", filepath.Join(dir, "restored"))
	if got, err := os.ReadFile(filepath.Join(dir, "restored")); err != nil || !bytes.Equal(got, long) {
		t.Errorf("restored: %v, %d bytes", err, len(got))
	}

	// The control plane is killed in the midst of a put, which goes on with the next one.
	big := make([]byte, 80<<20)
	rand.Read(big) //nolint:errcheck // it never fails
	file := filepath.Join(dir, "big")
	if err := os.WriteFile(file, big, 0o644); err != nil {
		t.Fatal(err)
	}
	_, before := stored()
	put := s.Command(t.Context(), "file", "put", file, "w:/big")
	var said bytes.Buffer
	put.Stderr = &said
	if err := put.Start(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		if _, now := stored(); now-before > int64(len(big))/4 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the put does not get far")
		}
	}
	s.ControlPlane.Kill()
	if _, now := stored(); now-before >= int64(len(big)) {
		t.Error("the kill came too late to show anything")
	}
	if err := s.StartControlPlane(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := put.Wait(); err != nil {
		t.Fatalf("%v: %s", err, said.String())
	}
	must(t, s, "file", "get", "w:/big", filepath.Join(dir, "big.back"))
	if got, err := os.ReadFile(filepath.Join(dir, "big.back")); err != nil || !bytes.Equal(got, big) {
		t.Errorf("after the kill: %v, %d bytes", err, len(got))
	}
	// What was under way at the kill, the client's 48 MiB at most, may lie there twice until it is
	// collected. Sealing adds some bytes to each chunk.
	if _, now := stored(); now-before > int64(len(big))+49<<20 {
		t.Errorf("%d bytes are stored for a file of %d", now-before, len(big))
	}
	auditVerifies(t, s)
}

// TestRealS3Mistakes: a control plane does not start with a bucket that it can't use, and says why in a line.
func TestRealS3Mistakes(t *testing.T) {
	server := s3test.Start(t)
	server.Bucket(t, "postern")
	for name, c := range map[string]struct {
		address, env, want string
	}{
		"bucket":   {server.Address("elsewhere", ""), "", "controlplane: --blob s3://elsewhere: there is no such bucket"},
		"secret":   {server.Address("postern", ""), "AWS_SECRET_ACCESS_KEY=wrong", "controlplane: --blob s3://postern: the object store refuses the credentials"},
		"user":     {server.Address("postern", ""), "AWS_ACCESS_KEY_ID=nobody", "controlplane: --blob s3://postern: the object store refuses the credentials"},
		"no key":   {server.Address("postern", ""), "AWS_ACCESS_KEY_ID=", "controlplane: --blob s3://postern: there are no credentials"},
		"endpoint": {"s3://postern?region=x&use_path_style=true&endpoint=http://127.0.0.1:1", "", "controlplane: --blob s3://postern: it can't be written to"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), filepath.Join(binaries(t), "controlplane"), "serve",
				"--data", filepath.Join(t.TempDir(), "data"), "--listen", "127.0.0.1:0", "--blob", c.address)
			cmd.Env = append(append(os.Environ(), server.Env()...), c.env)
			var said bytes.Buffer
			cmd.Stderr = &said
			err := cmd.Run()
			var lines []string // that are no log
			for line := range strings.Lines(said.String()) {
				if strings.HasPrefix(line, "controlplane: ") {
					lines = append(lines, line)
				}
			}
			if err == nil || len(lines) != 1 || !strings.HasPrefix(lines[0], c.want) || !strings.HasSuffix(said.String(), lines[0]) || strings.Contains(said.String(), server.Secret) {
				t.Errorf("%v, it said:\n%s\nwant %q", err, said.String(), c.want)
			}
		})
	}
}
