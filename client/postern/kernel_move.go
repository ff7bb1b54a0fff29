package main

import (
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func (a *app) kernelMoveCommand() *cobra.Command {
	return &cobra.Command{
		Use: "move KERNEL AGENT", Short: "Move a kernel to another agent, with its memory and private files",
		Long: `Suspend a kernel, send it to another agent's host, encrypted between the two hosts, and bring it back there.
It keeps its id, and clients that are attached stay so. The other host is asked first whether it takes the kernel;
if anything fails, or this command is interrupted before the kernel has arrived, it goes on where it was.
Its checkpoints go along; what lies on workspaces does not.`,
		Example: "  postern kernel move " + exampleKernel + " edge-2", Args: cobra.ExactArgs(2),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return a.completeAgents(cmd, nil, toComplete)
			}
			return a.completeKernels(cmd, args, toComplete)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				stream, err := c.Moves.MoveKernel(cmd.Context(), connect.NewRequest(&posternv1.MoveKernelRequest{KernelId: args[0], Agent: args[1]}))
				if err != nil {
					return err
				}
				defer stream.Close() //nolint:errcheck // it was read
				p := &moveProgress{app: a, terminal: isTerminal(a.stderr)}
				var last *posternv1.MoveKernelProgress
				for stream.Receive() {
					last = stream.Msg()
					p.tell(last)
				}
				p.end()
				var said *connect.Error
				err = stream.Err()
				if err != nil && (!errors.As(err, &said) || len(said.Details()) > 0 || cmd.Context().Err() != nil) {
					return err
				}
				if err != nil || last.GetKernel() == nil {
					return proto.Errorf(proto.CodeUnavailable, "the control plane went away before it said whether kernel %s was moved: see postern kernel list", args[0])
				}
				a.note(last.Kernel)
				return a.done(last.Kernel, "kernel %s is on agent %s", args[0], args[1])
			})
		},
	}
}

// moveProgress says on stderr how far a move is: on a terminal in one line, else a line
// for each stage.
type moveProgress struct {
	app      *app
	terminal bool
	stage    string
	width    int
}

func (p *moveProgress) tell(m *posternv1.MoveKernelProgress) {
	if m.Stage == "done" {
		return
	}
	if !p.terminal {
		if m.Stage != p.stage {
			p.app.info("%s", safe(m.Stage))
		}
		p.stage = m.Stage
		return
	}
	text := safe(m.Stage)
	if m.Stage == "sending" {
		text += " " + sizeText(m.Bytes) + " of at most " + sizeText(m.Expected)
	}
	fmt.Fprintf(p.app.stderr, "\r%-*s", p.width, text) //nolint:errcheck // nobody is left to tell
	p.width = len(text)
}

func (p *moveProgress) end() {
	if p.terminal && p.width > 0 {
		fmt.Fprintf(p.app.stderr, "\r%-*s\r", p.width, "") //nolint:errcheck // likewise
	}
}
