package fdkeeper

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/e2e/leakwait"
)

// The test program is also the keeper, the server, and the user of a mount.
func TestMain(m *testing.M) {
	switch os.Getenv("FDKEEPER_TEST_ROLE") {
	case "":
		goleak.VerifyTestMain(leakwait.Patient(m))
	case "keeper":
		os.Exit(keeperMain())
	case "server":
		os.Exit(serverMain())
	case "read":
		os.Exit(readMain())
	}
}
