package criu_test

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/agentd/checkpoint/internal/criu"
	"github.com/postern-dev/postern/e2e/leakwait"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == criu.HelperArg {
		os.Exit(criu.HelperMain())
	}
	goleak.VerifyTestMain(leakwait.Patient(m))
}
