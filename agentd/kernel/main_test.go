package kernel

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/e2e/leakwait"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case InitArg:
			os.Exit(InitMain())
		case ShimArg:
			os.Exit(ShimMain(os.Args[2:], nil))
		}
	}
	goleak.VerifyTestMain(leakwait.Patient(m))
}
