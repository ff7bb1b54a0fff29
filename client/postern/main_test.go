package main

import (
	"encoding/pem"
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"

	"github.com/postern-dev/postern/client/internal/simulatedcontrolplane"
	"github.com/postern-dev/postern/e2e/leakwait"
)

var update = flag.Bool("update", false, "rewrite what the scripts compare with")

// checked makes a leaked goroutine a failure without ending the process early:
// testscript has to clear its own things away.
type checked struct{ m *testing.M }

// Run implements testscript.TestingM.
func (c checked) Run() (code int) {
	goleak.VerifyTestMain(leakwait.Patient(c.m), goleak.Cleanup(func(exit int) { code = exit }))
	return code
}

func TestMain(m *testing.M) {
	testscript.Main(checked{m}, map[string]func(){"postern": main})
}

// servers are the simulated control planes by script.
type servers struct {
	mu sync.Mutex
	of map[string]*simulatedcontrolplane.Server
}

func TestScripts(t *testing.T) {
	all := &servers{of: map[string]*simulatedcontrolplane.Server{}}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		UpdateScripts:       *update,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			s := simulatedcontrolplane.Start(false)
			secure := simulatedcontrolplane.Start(true)
			env.Defer(s.Close)
			env.Defer(secure.Close)
			all.mu.Lock()
			all.of[env.WorkDir] = s
			all.mu.Unlock()
			for _, kv := range [][2]string{
				{"HOME", env.WorkDir},
				{"XDG_CONFIG_HOME", filepath.Join(env.WorkDir, "config")},
				{"SERVER", s.URL},
				{"SECURE", secure.URL},
				{"POSTERN_URL", s.URL},
				{"POSTERN_TOKEN", simulatedcontrolplane.AdminToken},
				{"ADMIN", simulatedcontrolplane.AdminToken},
				{"VIEWER", simulatedcontrolplane.ViewerToken},
			} {
				env.Setenv(kv[0], kv[1])
			}
			ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw})
			for name, text := range map[string]string{"ca.pem": string(ca), "admin.token": simulatedcontrolplane.AdminToken + "\n", "viewer.token": simulatedcontrolplane.ViewerToken + "\n"} {
				if err := os.WriteFile(filepath.Join(env.WorkDir, name), []byte(text), 0o600); err != nil {
					return err
				}
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":       exits,
			"mode":        mode,
			"size":        size,
			"running":     func(ts *testscript.TestScript, _ bool, _ []string) { awaitRunning(ts, all.server(ts)) },
			"hungup":      func(ts *testscript.TestScript, _ bool, _ []string) { awaitHangup(ts, all.server(ts)) },
			"holdsession": func(ts *testscript.TestScript, _ bool, _ []string) { all.server(ts).HoldSession() },
			"nosessions": func(ts *testscript.TestScript, _ bool, _ []string) {
				if n := all.server(ts).Sessions(); n != 0 {
					ts.Fatalf("%d sessions are open, want none", n)
				}
			},
			"breakaudit": func(ts *testscript.TestScript, _ bool, _ []string) {
				all.server(ts).BreakAudit()
			},
		},
	})
}

func (s *servers) server(ts *testscript.TestScript) *simulatedcontrolplane.Server {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.of[ts.Getenv("WORK")]
}

// exits CODE COMMAND...: the command ends with this exit code. Unless that is 0,
// stderr must hold exactly one line that begins with "postern: " (as many lines
// as they like with a SQL error).
func exits(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	stderr := ts.ReadFile("stderr")
	if got != want {
		ts.Fatalf("exit code %d, want %d; stderr: %s", got, want, stderr)
	}
	lines := strings.Split(strings.TrimSuffix(stderr, "\n"), "\n")
	if want != 0 && !slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, "postern: ERROR") }) {
		own := slices.DeleteFunc(lines, func(l string) bool { return !strings.HasPrefix(l, "postern: ") })
		if len(own) != 1 {
			ts.Fatalf("stderr has %d lines of ours, want 1: %s", len(own), stderr)
		}
	}
}

// mode OCTAL FILE: the file has this mode.
func mode(ts *testscript.TestScript, _ bool, args []string) {
	info, err := os.Stat(ts.MkAbs(args[1]))
	ts.Check(err)
	if got := strconv.FormatInt(int64(info.Mode().Perm()), 8); got != args[0] {
		ts.Fatalf("%s has mode %s, want %s", args[1], got, args[0])
	}
}

// size BYTES FILE writes so many blanks to a file.
func size(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte("select 1"+strings.Repeat(" ", n-8)), 0o600))
}

func awaitRunning(ts *testscript.TestScript, s *simulatedcontrolplane.Server) {
	await(ts, "a statement to run", s.Running)
}

func awaitHangup(ts *testscript.TestScript, s *simulatedcontrolplane.Server) {
	await(ts, "the client to hang up", func() bool { return s.Hangups() > 0 })
}

func await(ts *testscript.TestScript, what string, ok func() bool) {
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			ts.Fatalf("waited in vain for %s", what)
		}
	}
}
