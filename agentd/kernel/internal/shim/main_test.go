package shim

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/agentd/checkpoint"
	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/e2e/leakwait"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case sandbox.InitArg:
			os.Exit(sandbox.InitMain())
		case Arg:
			lib, err := criutest.Library()
			if err != nil {
				panic(err)
			}
			os.Exit(Main(os.Args[2:], checkpoint.NewDriver("").TestOnlyPreload(lib)))
		case checkpoint.HelperArg:
			os.Exit(checkpoint.HelperMain())
		}
	}
	goleak.VerifyTestMain(leakwait.Patient(m))
}
