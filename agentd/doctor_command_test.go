package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/doctor"
	"github.com/postern-dev/postern/e2e/simulatedvault"
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

// TestDoctorReadsKernelsSecrets: each of the host's own, and nothing of a value is told.
func TestDoctorReadsKernelsSecrets(t *testing.T) {
	v := simulatedvault.Start(simulatedvault.Config{})
	defer v.Close()
	v.Put("team/good", map[string]any{"value": "canary-of-doctor"})
	v.Put("team/short", map[string]any{"value": "canary"})
	dir := t.TempDir()
	for name, text := range map[string]string{"token": simulatedvault.RootToken, "ca.pem": string(v.CA())} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := config.Parse("f.yaml", fmt.Appendf(nil, `url: https://cp
vault: {address: '%s', ca_file: '%s/ca.pem', token: {file: '%[2]s/token'}}
kernels: {secrets: {vault: {GOOD: {path: secret/team/good}, SHORT: {path: secret/team/short}, GONE: {path: secret/team/gone}}}}
`, v.URL(), dir), nil)
	if err != nil {
		t.Fatal(err)
	}
	var r doctor.Report
	examineSecrets(t.Context(), &r, c)
	got := fmt.Sprint(r.Checks)
	want := map[string]doctor.Result{"kernels' secret GOOD": doctor.OK, "kernels' secret SHORT": doctor.Failed, "kernels' secret GONE": doctor.Failed}
	for _, check := range r.Checks {
		if check.Result != want[check.Name] {
			t.Errorf("%s: %s %s", check.Name, check.Result, check.Message)
		}
	}
	if len(r.Checks) != len(want) || strings.Contains(got, "canary") {
		t.Errorf("got %s", got)
	}
}
