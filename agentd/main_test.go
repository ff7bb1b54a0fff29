package main

import (
	"fmt"
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"

	"github.com/postern-dev/postern/agentd/checkpoint"
	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
	"github.com/postern-dev/postern/agentd/egress"
	"github.com/postern-dev/postern/agentd/kernel"
	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/agentd/uplink"
	"github.com/postern-dev/postern/e2e/leakwait"
)

// TestMain is also the main of SQL sessions, and of the commands in testdata.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == sqlsession.ChildArg {
		os.Exit(sqlsession.ChildMain())
	}
	if len(os.Args) > 1 && os.Args[1] == sqlsession.ParserArg {
		os.Exit(sqlsession.ParserMain())
	}
	if len(os.Args) > 1 && os.Args[1] == uplink.Arg {
		os.Exit(uplink.Main())
	}
	if len(os.Args) > 1 && os.Args[1] == egress.Arg {
		os.Exit(egress.Main())
	}
	if len(os.Args) > 1 && os.Args[1] == kernel.InitArg {
		os.Exit(kernel.InitMain())
	}
	if len(os.Args) > 1 && os.Args[1] == keeperArg {
		os.Exit(keeperMain(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == mountdArg {
		os.Exit(mountdMain(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == kernel.ShimArg {
		library, err := criutest.Library()
		if err != nil {
			panic(err)
		}
		os.Exit(kernel.ShimMain(os.Args[2:], checkpoint.NewDriver("").TestOnlyPreload(library)))
	}
	if len(os.Args) > 1 && os.Args[1] == checkpoint.HelperArg {
		os.Exit(checkpoint.HelperMain())
	}
	if os.Getenv("POSTERN_TEST_AGENTD") == "1" { // a whole process of ours: see startProcess
		os.Exit(run(os.Args[1:]))
	}
	testscript.Main(leaks{m}, map[string]func(){"agentd": main})
}

// leaks fails the tests when goroutines are left behind.
type leaks struct{ *testing.M }

// Run implements testscript.TestingM.
func (l leaks) Run() int {
	code := l.M.Run()
	if code == 0 {
		leakwait.Wait()
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return code
}

func TestCommandLine(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata"})
}
