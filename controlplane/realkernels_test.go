package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/postern-dev/postern/e2e/jupyterclients"
	"github.com/postern-dev/postern/e2e/simulatedkernels"
)

// realKernels is a control plane and an agent whose kernels are real: only the manager
// between the tunnel and the kernels' shims is a simulated one.
func realKernels(t *testing.T) (*testServer, *simulatedkernels.Shims, jupyterclients.Place) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for kernels' namespaces")
	}
	dir := t.TempDir()
	for _, name := range []string{"agentd", "client/postern"} {
		binary := filepath.Join(dir, filepath.Base(name))
		if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, "../"+name).CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, out)
		}
	}
	state := filepath.Join(dir, "kernels")
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	s := startServer(t)
	shims := simulatedkernels.NewShims(filepath.Join(dir, "agentd"), state)
	t.Cleanup(shims.Close)
	a := newSimulatedAgent(s)
	a.kernels = shims
	if err := a.register(t.Context(), s.newKey(t, s.token, 1), "edge"); err != nil {
		t.Fatal(err)
	}
	a.attach(t)
	return s, shims, jupyterclients.Place{Postern: filepath.Join(dir, "postern"), URL: s.url, Agent: "edge", Token: s.newToken(t, s.token, "ana", "analyst")}
}

func TestJupyterClientsWithRealKernels(t *testing.T) {
	_, shims, place := realKernels(t)
	place.All(t)
	if left := shims.Kernels(); len(left) != 0 {
		t.Errorf("kernels are left: %v", left)
	}
}
