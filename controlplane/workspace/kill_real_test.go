//go:build reals3

package workspace_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/postern-dev/postern/e2e/s3test"
)

// With this tag TestKill keeps contents on a real S3 server: see make s3-test.
func init() {
	killPlace = func(t *testing.T) (where, dir string) {
		s := s3test.Start(t)
		for _, kv := range s.Env() {
			name, value, _ := strings.Cut(kv, "=")
			t.Setenv(name, value)
		}
		dir = s.Bucket(t, "files")
		return s.Address("files", "p/"), filepath.Join(dir, "p")
	}
}
