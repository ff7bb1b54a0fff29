package store_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/controlplane/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(storetest.Main{M: m}) }
