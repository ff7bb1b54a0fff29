//go:build reals3

package workspace_test

import (
	"testing"

	"github.com/postern-dev/postern/e2e/s3test"
	"github.com/postern-dev/postern/e2e/storetest"
)

// TestRealBucketFailsOneInTen is TestSimulatedBucketFailsOneInTen with a real S3 server: see make s3-test.
func TestRealBucketFailsOneInTen(t *testing.T) {
	server := s3test.Start(t)
	server.Bucket(t, "files")
	setEnv(t, server.Env())
	faults := s3test.NewFaults(t, server.URL, 10)
	through := *server
	through.URL = faults.URL
	failingBucket(t, storetest.SQLite(t), faults, through.Address("files", "p/"), 40)
}
