package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/proto"
)

func newSource() *cobra.Command {
	cmd := &cobra.Command{
		Use: "source", Short: "check a data source before it is saved",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usagef("source: say check: see agentd source --help")
		},
	}
	cmd.AddCommand(newSourceCheck())
	return cmd
}

func newSourceCheck() *cobra.Command {
	var (
		p      places
		file   string
		offer  bool
		output string
	)
	cmd := &cobra.Command{
		Use: "check --file FILE|- [NAME]", Short: "connect to a data source of a file that is not in force, and look at it",
		Long: `Checks a data source before it is saved: the running agentd reads FILE, which
has the form of agentd.yaml, connects to the source NAME (which may be left out
when there is only one) in a session of its own, and says what works. Nothing is
saved. With --offer it also prints a one-time token: who has it can check the
same source from the control plane, once and within 15 minutes, with
postern source check AGENT/NAME --one-time-token-file FILE.`,
		Example: "  agentd source check --file new.yaml warehouse\n  agentd source check --file new.yaml --offer warehouse",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if file == "" {
				return usagef("source check: say which file with --file FILE, or - for standard input")
			}
			if output != "" && output != "json" {
				return usagef("source check: -o %q is not json", output)
			}
			raw, err := readAll(cmd.InOrStdin(), file)
			if err != nil {
				return err
			}
			name := ""
			if len(args) == 1 {
				name = args[0]
			}
			answer, err := control.AskCandidate(cmd.Context(), p.runtimeDir(), control.Candidate{File: file, Text: string(raw), Source: name, Offer: offer})
			if err != nil {
				return err
			}
			if answer.Error != "" {
				return proto.Errorf(proto.CodeSourceConfig, "%s", answer.Error)
			}
			if err := printCandidate(cmd.OutOrStdout(), cmd.ErrOrStderr(), output, answer); err != nil {
				return err
			}
			for _, c := range answer.Checks {
				if c.Result == "failed" {
					return exitCode(proto.ExitFailed)
				}
			}
			return nil
		},
	}
	p.flags(cmd, "runtime")
	cmd.Flags().StringVar(&file, "file", "", "a file in the form of agentd.yaml; - is standard input")
	cmd.Flags().BoolVar(&offer, "offer", false, "print a one-time token for a check from the control plane")
	cmd.Flags().StringVarP(&output, "output", "o", "", "json: all of it, for programs")
	return cmd
}

// readAll reads a file, or standard input for "-", up to the bound of a
// configuration.
func readAll(stdin io.Reader, file string) ([]byte, error) {
	r := stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("read the data source: %w", err)
		}
		defer f.Close() //nolint:errcheck // it was only read
		r = f
	}
	raw, err := io.ReadAll(io.LimitReader(r, control.MaxCandidate+1))
	if err != nil {
		return nil, fmt.Errorf("read the data source: %w", err)
	}
	if len(raw) > control.MaxCandidate {
		return nil, fmt.Errorf("%s has more than %d bytes", file, control.MaxCandidate)
	}
	return raw, nil
}

func printCandidate(out, errs io.Writer, output string, a control.CandidateAnswer) error {
	if output == "json" {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(a)
	}
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, c := range a.Checks {
		fmt.Fprintf(t, "%s\t%s\t%s\n", c.Name, c.Result, c.Message) //nolint:errcheck // Flush says it
		if c.Remedy != "" {
			fmt.Fprintf(t, "\t\t-> %s\n", c.Remedy) //nolint:errcheck // likewise
		}
	}
	if err := t.Flush(); err != nil || a.Token == "" {
		return err
	}
	// The token alone is the last line of the output, so that it can be cut off.
	fmt.Fprintf(errs, "one-time token for %s, until %s:\n", a.Source, a.Expires.Local().Format(time.TimeOnly)) //nolint:errcheck // nobody is left to tell
	_, err := fmt.Fprintln(out, a.Token)
	return err
}
