package pki_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/e2e/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(storetest.Main{M: m}) }
