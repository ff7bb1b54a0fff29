package fuseserver

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/e2e/leakwait"
)

// The test program is its own helper: a mount is served, and used, by processes of their
// own, never by the test.
func TestMain(m *testing.M) {
	switch os.Getenv("FUSESERVER_TEST_ROLE") {
	case "":
		goleak.VerifyTestMain(leakwait.Patient(m))
	case "serve":
		os.Exit(serveMain())
	case "use":
		os.Exit(useMain())
	}
}
