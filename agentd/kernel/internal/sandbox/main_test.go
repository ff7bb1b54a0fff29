package sandbox

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/e2e/leakwait"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == InitArg {
		os.Exit(InitMain())
	}
	if f, ok := testPrograms[os.Getenv("SANDBOX_TEST_PROGRAM")]; ok {
		f()
		return
	}
	goleak.VerifyTestMain(leakwait.Patient(m))
}

// testPrograms are what this binary does instead of testing.
var testPrograms = map[string]func(){}
