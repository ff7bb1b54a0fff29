package replica

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/e2e/leakwait"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(leakwait.Patient(m)) }
