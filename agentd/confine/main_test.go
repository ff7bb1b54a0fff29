package confine_test

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// probeArg makes the test binary a confined process.
const probeArg = "probe"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == probeArg {
		os.Exit(probe(os.Args[2:]))
	}
	goleak.VerifyTestMain(m)
}
