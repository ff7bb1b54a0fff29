package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/e2e/leakwait"
	"github.com/postern-dev/postern/e2e/pgserver"
)

// long is whether there is time for the full lengths: `make e2e-long`.
var long = os.Getenv("POSTERN_LONG") == "1"

func TestMain(m *testing.M) {
	// A script's background job ignores SIGINT, and so would all that it starts: they get the
	// default back when it is handled here.
	if signal.Ignored(os.Interrupt) {
		signal.Notify(make(chan os.Signal, 1), os.Interrupt)
	}
	code := m.Run()
	if err := shared.close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if code == 0 {
		leakwait.Wait()
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// shared is what all tests use, made by the first that needs it.
var shared struct {
	once struct{ bin, postgres sync.Once }
	bin  string
	err  error // of building
	pg   *pgserver.Server
	perr error
	cleanUp
}

type cleanUp struct {
	mu  sync.Mutex
	all []func() error
}

func (c *cleanUp) add(f func() error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all = append(c.all, f)
}

func (c *cleanUp) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.all {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

// binaries is the directory of agentd, controlplane and postern. They are built
// as they are shipped: the race detector looks at packages, not at these tests'
// timing.
func binaries(t *testing.T) string {
	t.Helper()
	shared.once.bin.Do(func() {
		if shared.bin, shared.err = os.MkdirTemp("", "postern-e2e-bin-"); shared.err != nil {
			return
		}
		shared.add(func() error { return os.RemoveAll(shared.bin) })
		// SQL sessions run as another user and execute agentd.
		if shared.err = os.Chmod(shared.bin, 0o755); shared.err != nil {
			return
		}
		for _, program := range []string{"agentd", "controlplane", "client/postern"} {
			cmd := exec.Command("go", "build", "-o", filepath.Join(shared.bin, filepath.Base(program)), "./"+program)
			cmd.Dir = ".."
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := cmd.CombinedOutput(); err != nil {
				shared.err = fmt.Errorf("build %s: %w\n%s", program, err, out)
				return
			}
		}
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.bin
}

// postgres is a server with the role "reader" (password readerPassword), used by
// all tests that do not harm it.
func postgres(t *testing.T) *pgserver.Server {
	t.Helper()
	shared.once.postgres.Do(func() {
		if shared.pg, shared.perr = pgserver.Launch(t.Context(), pgserver.Options{}); shared.perr != nil {
			return
		}
		shared.add(shared.pg.Stop)
		shared.perr = shared.pg.CreateRole(t.Context(), "reader", readerPassword)
	})
	if shared.perr != nil {
		t.Fatal(shared.perr)
	}
	return shared.pg
}

// readerPassword is for a database that lives as long as the tests.
const readerPassword = "e2e-only"
