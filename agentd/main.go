// Command agentd is the host's side of Postern: it joins a host to a control
// plane, keeps the tunnel that it dialed, and answers what the host's policy
// allows. main.go dispatches, maps errors to exit codes and prints the one line;
// each command has a file of its own; daemon.go is the type Daemon that holds
// every subsystem and wires them. docs/agentd.md describes it to its users.
package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/agentd/checkpoint"
	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/egress"
	"github.com/postern-dev/postern/agentd/kernel"
	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/agentd/uplink"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/clidoc"
)

var _ kernel.CRIU = (*checkpoint.Driver)(nil)

func main() {
	// A SQL session's process, a parser's, an uplink and an egress process must do nothing else first.
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
	if len(os.Args) > 1 && os.Args[1] == checkpoint.HelperArg {
		os.Exit(checkpoint.HelperMain())
	}
	if len(os.Args) > 1 && os.Args[1] == kernel.ShimArg {
		os.Exit(kernel.ShimMain(os.Args[2:], checkpoint.NewDriver("")))
	}
	if len(os.Args) > 1 && os.Args[1] == keeperArg {
		os.Exit(keeperMain(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == mountdArg {
		os.Exit(mountdMain(os.Args[2:]))
	}
	os.Exit(run(os.Args[1:]))
}

// run is main for tests: it returns the exit code.
func run(args []string) int {
	root := newRoot()
	root.SetArgs(args)
	err := root.Execute()
	if err == nil {
		return proto.ExitDone
	}
	var silent exitCode
	if errors.As(err, &silent) {
		return int(silent)
	}
	fmt.Fprintln(os.Stderr, "agentd: "+oneLine(err.Error()))
	var wrong usageError
	if errors.As(err, &wrong) {
		return proto.ExitUsage
	}
	var problems *config.Error
	if errors.As(err, &problems) && len(problems.Problems) > 1 {
		for _, line := range problems.Lines()[1:] {
			fmt.Fprintln(os.Stderr, "  "+line)
		}
	}
	return proto.ExitCode(err)
}

// exitCode is an error that was told already.
type exitCode int

// Error implements error.
func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// usageError is a wrong command line.
type usageError struct{ text string }

// Error implements error.
func (e usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return usageError{fmt.Sprintf(format, args...)} }

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

const (
	defaultState   = "/var/lib/postern-agentd"
	defaultRuntime = "/run/postern-agentd"
)

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "agentd",
		Short: "the host's side of Postern: dials out to a control plane, answers what this host allows",
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				// Never quoted: somebody may have typed a key here.
				return usagef("unknown command: see agentd --help")
			}
			return cmd.Help()
		},
		Args:          cobra.ArbitraryArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		text := err.Error()
		if strings.Contains(text, "prk1_") {
			text = "a registration key does not belong on the command line: use --key-file"
		}
		return usagef("%s: see %s --help", oneLine(text), cmd.CommandPath())
	})
	root.AddCommand(newRegister(), newRun(), newStatus(), newMount(), newUmount(), newDoctor(), newLogLevel(), newKeys(), newSource(), newAudit(), newVersion(), clidoc.ManCommand(root, "8", proto.Software()))
	return root
}

// noArgs refuses arguments without quoting them.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return usagef("%s takes no arguments: see %s --help", cmd.CommandPath(), cmd.CommandPath())
}

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "print version and protocol", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := proto.Version()
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "agentd %s, protocol %d.%d\n", v.Software, v.Major, v.Minor)
			return err
		},
	}
}

// places are the flags that say where things are.
type places struct {
	config  string
	state   string
	runtime string
	given   func(name string) bool
}

func (p *places) flags(cmd *cobra.Command, names ...string) {
	for _, name := range names {
		switch name {
		case "config":
			cmd.Flags().StringVar(&p.config, "config", config.DefaultFile, "configuration `FILE`")
		case "state":
			cmd.Flags().StringVar(&p.state, "state", defaultState, "state `DIR`ectory: identity and audit log")
		case "runtime":
			cmd.Flags().StringVar(&p.runtime, "runtime", "", "`DIR`ectory of the status socket (default "+defaultRuntime+", or STATE/run when not root)")
		}
	}
	p.given = func(name string) bool { f := cmd.Flags().Lookup(name); return f != nil && f.Changed }
}

func (p *places) runtimeDir() string {
	switch {
	case p.runtime != "":
		return p.runtime
	case os.Geteuid() == 0 && p.state == defaultState:
		return defaultRuntime
	}
	// A second agentd on the host, or one without root.
	return p.state + "/run"
}

// loadConfig reads the configuration. A default file that is not there is no
// error: found is false then.
func (p *places) loadConfig() (c *config.Config, found bool, err error) {
	c, err = config.Load(p.config, sqlsession.ValidateDSN)
	if errors.Is(err, os.ErrNotExist) && !p.given("config") {
		return config.Default(), false, nil
	}
	return c, err == nil, err
}
