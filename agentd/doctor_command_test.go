package main

import (
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/doctor"
)

// TestDoctorLooksAtTheConfiguredCRIU: the one that agentd would use, not the one that it
// would find by itself.
func TestDoctorLooksAtTheConfiguredCRIU(t *testing.T) {
	path := t.TempDir() + "/criu"
	var r doctor.Report
	examineCheckpoints(t.Context(), &r, path)
	if len(r.Checks) != 1 || r.Checks[0].Result != doctor.Warning || !strings.Contains(r.Checks[0].Remedy, path) {
		t.Errorf("got %+v", r.Checks)
	}
}
