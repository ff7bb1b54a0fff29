package main

import (
	"slices"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// TestExecuteRoundTrip says what a cell costs from a client through control plane and
// tunnel to a simulated kernel and back; make bench has the figure with real ones.
func TestExecuteRoundTrip(t *testing.T) {
	l := newLab(t)
	c := l.dial(t, "bench", true)
	var took []time.Duration
	for range 100 {
		began := time.Now()
		id := c.execute("value 1")
		idle, replied := false, false
		c.until(func(m *posternv1.KernelMessage, h, parent jupyter.Header) bool {
			if parent.ID == id {
				idle = idle || h.Type == "status" && string(m.Content) == `{"execution_state":"idle"}`
				replied = replied || m.Channel == jupyter.Shell
			}
			return idle && replied
		})
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	t.Logf("execute round trip: median %s, 90%% %s, least %s", took[50], took[90], took[0])
	if entries := audited(t, l.testServer, "kernel.execute"); len(entries) != 100 {
		t.Errorf("%d audit entries, want 100", len(entries))
	}
}
