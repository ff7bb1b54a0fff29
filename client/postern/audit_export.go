package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// exportPage is how many entries are asked for at once.
const exportPage = 1000

// auditExport writes a whole chain as JSON lines.
func (a *app) auditExport() *cobra.Command {
	var agent string
	var from uint64
	cmd := &cobra.Command{
		Use: "export", Short: "Write all audit entries as JSON lines, oldest first, byte for byte as they were hashed",
		Long: `Write all audit entries as JSON lines, oldest first, byte for byte as they were hashed. The number of the last one
is told on stderr: --from the next goes on there. Each page is verified on its way; a chain that breaks ends it with exit code 1.`,
		Example: "  postern audit export > audit.jsonl\n  postern audit verify --file audit.jsonl", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if from == 0 {
				return &usageError{errors.New("--from begins at 1")}
			}
			return a.with(func(c *client.Client) error {
				out := bufio.NewWriterSize(a.stdout, 64<<10)
				var chain *auditchain.Verifier
				next := from
				for {
					resp, err := c.Audit.ListAudit(cmd.Context(), connect.NewRequest(&posternv1.ListAuditRequest{From: next, Limit: exportPage, Agent: agent}))
					if err != nil {
						return errors.Join(err, out.Flush())
					}
					for _, line := range resp.Msg.Entries {
						if chain == nil {
							if chain, err = chainFrom(line); err != nil {
								return errors.Join(err, out.Flush())
							}
						}
						if err := chain.Add(line); err != nil {
							return errors.Join(proto.Errorf(proto.CodeInternal, "%s: run `postern audit verify`", err), out.Flush())
						}
						if _, err := out.Write(append(line, '\n')); err != nil {
							return err
						}
						next = chain.Head().Sequence + 1
					}
					if len(resp.Msg.Entries) == 0 {
						break
					}
				}
				if err := out.Flush(); err != nil {
					return err
				}
				_, err := fmt.Fprintf(a.stderr, "exported up to entry %d\n", next-1)
				return err
			})
		},
	}
	cmd.Flags().StringVar(&agent, "agent", "", "this agent's own log instead of the control plane's")
	cmd.Flags().Uint64Var(&from, "from", 1, "begin at this sequence number")
	cmd.RegisterFlagCompletionFunc("agent", a.completeAgents) //nolint:errcheck // fails on unknown flags alone
	return cmd
}

// chainFrom verifies what begins with a line, whatever came before it.
func chainFrom(line []byte) (*auditchain.Verifier, error) {
	e, err := auditchain.Decode(line)
	if err != nil {
		return nil, proto.Errorf(proto.CodeInternal, "the first entry cannot be read: %s", err)
	}
	before, err := auditchain.HeadOf(auditchain.Entry{Sequence: e.Sequence - 1, Hash: e.Prev})
	if err != nil || e.Sequence == 0 {
		return nil, proto.Errorf(proto.CodeInternal, "the first entry does not say what comes before it")
	}
	return auditchain.NewVerifier(before), nil
}

// verifyExport verifies JSON lines that were exported, without a control plane.
func (a *app) verifyExport(file string) (err error) {
	var in io.Reader = os.Stdin
	name := "standard input"
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close() //nolint:errcheck // it is only read
		in, name = f, file
	}
	report := &posternv1.ChainReport{Chain: name, Ok: true}
	var chain *auditchain.Verifier
	first := uint64(0)
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 64<<10), auditchain.MaxLine+1)
	for lines.Scan() {
		if chain == nil {
			if chain, err = chainFrom(lines.Bytes()); err != nil {
				return err
			}
			first = chain.Head().Sequence + 1
		}
		if err := chain.Add(lines.Bytes()); err != nil {
			report.Ok, report.Message = false, err.Error()
			break
		}
		report.Entries++
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	switch {
	case chain == nil:
		report.Message = "it is empty"
	case report.Ok:
		report.Message = fmt.Sprintf("entries %d to %d, head %x", first, chain.Head().Sequence, chain.Head().Hash)
	}
	return a.reportChains([]*posternv1.ChainReport{report})
}
