package confine_test

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/e2e/leakwait"
)

// probeArg makes the test binary a confined process.
const probeArg = "probe"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == probeArg {
		os.Exit(probe(os.Args[2:]))
	}
	goleak.VerifyTestMain(leakwait.Patient(m))
}
