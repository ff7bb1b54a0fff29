package mountd

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/e2e/leakwait"
)

// The test program is also the keeper, mountd, and the user of a mount.
func TestMain(m *testing.M) {
	switch os.Getenv("MOUNTD_TEST_ROLE") {
	case "":
		goleak.VerifyTestMain(leakwait.Patient(m))
	case "keeper":
		os.Exit(keeperMain())
	case "mountd":
		os.Exit(mountdMain())
	case "read":
		os.Exit(readMain())
	case "write":
		os.Exit(writeMain())
	}
}
