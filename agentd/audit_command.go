package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/agentd/audit"
	"github.com/postern-dev/postern/proto/auditchain"
)

func newAudit() *cobra.Command {
	cmd := &cobra.Command{
		Use: "audit", Short: "read and verify this host's audit log (no running agentd needed)",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usagef("audit: say list or verify: see agentd audit --help")
		},
	}
	cmd.AddCommand(newAuditVerify(), newAuditList())
	return cmd
}

func auditThere(p places) error {
	if _, err := os.Stat(audit.Dir(p.state)); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no audit log in %s: has agentd run here, and is --state right?", audit.Dir(p.state))
	} else if err != nil {
		return err
	}
	return nil
}

func newAuditVerify() *cobra.Command {
	var p places
	cmd := &cobra.Command{
		Use: "verify", Short: "check that no entry was removed, altered or reordered",
		Example: "  agentd audit verify", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := auditThere(p); err != nil {
				return err
			}
			found, err := audit.Verify(p.state)
			if err != nil {
				return err
			}
			text := "ok: " + found.String()
			if head := found.Head; head.Sequence > 0 {
				text += ", head " + hex.EncodeToString(head.Hash[:])
			}
			if found.Torn {
				text += " (a last line is half written: agentd is writing it, or died then)"
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), text)
			return err
		},
	}
	p.flags(cmd, "state")
	return cmd
}

func newAuditList() *cobra.Command {
	var p places
	var output string
	var from uint64
	var last int
	cmd := &cobra.Command{
		Use: "list", Short: "print entries, oldest first",
		Example: "  agentd audit list --last 20\n  agentd audit list -o json --from 1 | jq .", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if err := auditThere(p); err != nil {
				return err
			}
			if !cmd.Flags().Changed("from") {
				found, err := audit.Verify(p.state)
				if err != nil {
					return err
				}
				from = 1
				if n := uint64(max(last, 0)); found.Head.Sequence > n {
					from = found.Head.Sequence - n + 1
				}
			}
			out := cmd.OutOrStdout()
			if output == "json" {
				return audit.List(p.state, from, func(line []byte, _ auditchain.Entry) error {
					_, err := fmt.Fprintf(out, "%s\n", line)
					return err
				})
			}
			t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "SEQUENCE\tTIME\tACTION\tACTOR\tSOURCE\tOUTCOME\tROWS\tSTATEMENT OR ERROR") //nolint:errcheck // Flush says it
			if err := audit.List(p.state, from, func(_ []byte, e auditchain.Entry) error {
				text := e.Statement
				if e.Error != "" {
					text = e.Error
				}
				_, err := fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\t%s\t%d\t%s\n", e.Sequence, e.Time.Format(time.RFC3339), e.Action, e.Actor, e.Source, e.Outcome, e.Rows, short(text))
				return err
			}); err != nil {
				return err
			}
			return t.Flush()
		},
	}
	p.flags(cmd, "state")
	outputFlag(cmd, &output)
	cmd.Flags().Uint64Var(&from, "from", 1, "first sequence `NUMBER` to print")
	cmd.Flags().IntVar(&last, "last", 50, "`NUMBER` of entries to print when --from is not given")
	return cmd
}

// short is one line of at most 80 characters, without control characters.
func short(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, oneLine(s))
	if runes := []rune(s); len(runes) > 80 {
		return string(runes[:79]) + "…"
	}
	return s
}
