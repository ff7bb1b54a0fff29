package workspace_test

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/e2e/storetest"
)

func TestMain(m *testing.M) {
	if arg := os.Getenv(killEnv); arg != "" {
		storeUntilKilled(arg)
	}
	goleak.VerifyTestMain(storetest.Main{M: m})
}
