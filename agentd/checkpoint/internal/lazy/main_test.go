package lazy

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/e2e/leakwait"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == testHelper && os.Args[2] == Arg {
		os.Exit(Main(os.Args[3]))
	}
	goleak.VerifyTestMain(leakwait.Patient(m), goleak.Cleanup(func(code int) {
		if dir, _ := stormFiles(); dir != "" {
			_ = os.RemoveAll(dir)
		}
		os.Exit(code)
	}))
}
