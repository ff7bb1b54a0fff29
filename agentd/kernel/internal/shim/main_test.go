package shim

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case sandbox.InitArg:
			os.Exit(sandbox.InitMain())
		case Arg:
			os.Exit(Main(os.Args[2:]))
		}
	}
	goleak.VerifyTestMain(m)
}
