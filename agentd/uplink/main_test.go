package uplink_test

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/agentd/uplink"
	"github.com/postern-dev/postern/e2e/leakwait"
)

// Arguments that make the test binary something else.
const (
	probeArg  = "probe"  // tries what an uplink must not be able to do
	parentArg = "parent" // an agentd that is killed
	silentArg = "silent" // an uplink that does nothing
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case uplink.Arg:
			os.Exit(uplink.Main())
		case probeArg:
			os.Exit(probe(os.Args[2:]))
		case parentArg:
			os.Exit(parent(os.Args[2]))
		case silentArg:
			forever()
		}
	}
	goleak.VerifyTestMain(leakwait.Patient(m))
}
