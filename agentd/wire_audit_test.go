package main

import (
	"math"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/audit"
	"github.com/postern-dev/postern/agentd/report"
	"github.com/postern-dev/postern/proto/auditchain"
)

// TestAgree: only what the control plane has said that it knows, and that is what this host has, may be
// retired; and a control plane that knows an entry that was retired since is no reason for a warning.
func TestAgree(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	log, _, err := audit.Open(t.TempDir(), audit.Config{Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() //nolint:errcheck // it never fails
	log.SetRetention(audit.Retention{Age: time.Hour})
	var heads []auditchain.Head
	for range 4 {
		if err := log.Append(t.Context(), auditchain.Entry{Action: "test"}); err != nil {
			t.Fatal(err)
		}
		heads = append(heads, log.Head())
		now = now.Add(25 * time.Hour)
	}
	d := &Daemon{log: log, reports: report.New(report.Config{Log: log})}
	say := func(known auditchain.Head) string {
		warning := d.compareHeads(known.Proto())
		d.agree(known.Proto(), warning)
		return warning
	}
	if warning := say(heads[1]); warning != "" || d.agreed.Load() != 2 {
		t.Errorf("%q, agreed on %d", warning, d.agreed.Load())
	}
	if got := d.retirable(); got != 0 {
		t.Errorf("entries up to %d may go although kernels' statements were not told", got)
	}
	wrong := heads[2]
	wrong.Hash[0]++
	if warning := say(wrong); warning == "" || d.agreed.Load() != 0 {
		t.Errorf("another entry: %q, agreed on %d", warning, d.agreed.Load())
	}
	say(heads[3])
	if n, err := log.Retire(t.Context(), audit.Retention{Age: time.Hour}, math.MaxUint64); err != nil || n != 3 {
		t.Fatalf("retired %d, %v", n, err)
	}
	for i, head := range heads {
		if warning := say(head); warning != "" {
			t.Errorf("entry %d: %s", i+1, warning)
		}
	}
	if warning := say(auditchain.Head{Sequence: 4, Hash: heads[0].Hash}); warning == "" {
		t.Error("an entry that is kept and differs passes")
	}
}
