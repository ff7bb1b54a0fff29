package main

import (
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	exampleKernel     = "01a20249-8294-70e3-b8c2-6b2fc9eebe2f"
	exampleCheckpoint = "ckp_01kaf3v6x2h5r0w8d4q1n7m9ta"
)

func (a *app) kernelCheckpointCommand() *cobra.Command {
	var r posternv1.CheckpointKernelRequest
	var check bool
	var wait time.Duration
	cmd := &cobra.Command{
		Use: "checkpoint KERNEL", Short: "Save a kernel, which goes on, and print the checkpoint's id",
		Long: `Save the memory of all of a kernel's processes and its private files, on its host. What lies
on workspaces is not part of it. With --check nothing is saved: what stands in the way is listed, and the
exit code is 1 if there is anything.`,
		Example: "  postern kernel checkpoint " + exampleKernel + " --label 'model trained'\n  postern kernel checkpoint " + exampleKernel + " --check",
		Args:    cobra.ExactArgs(1), ValidArgsFunction: a.completeKernels,
		RunE: func(cmd *cobra.Command, args []string) error {
			r.KernelId = args[0]
			return a.with(func(c *client.Client) error {
				if check {
					return a.checkKernel(cmd, c, args[0])
				}
				if cmd.Flags().Changed("wait") {
					r.Wait = durationpb.New(wait)
				}
				resp, err := c.Checkpoints.CheckpointKernel(cmd.Context(), connect.NewRequest(&r))
				if err != nil {
					return err
				}
				if resp.Msg.Busy {
					a.info("the kernel was saved in the midst of a cell: --wait lets one end first")
				}
				return a.done(resp.Msg, "%s", resp.Msg.Checkpoint.GetId())
			})
		},
	}
	cmd.Flags().StringVar(&r.Label, "label", "", "what it is, for people; at most 256 bytes")
	cmd.Flags().BoolVar(&r.Protected, "protect", false, "never delete it by the host's limits")
	cmd.Flags().DurationVar(&wait, "wait", 0, "how long a running cell may go on first; at most 1m")
	cmd.Flags().BoolVar(&check, "check", false, "only say what stands in the way")
	return cmd
}

func (a *app) checkKernel(cmd *cobra.Command, c *client.Client, id string) error {
	resp, err := c.Checkpoints.CheckKernel(cmd.Context(), connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: id}))
	if err != nil {
		return err
	}
	err = printList(a, resp.Msg.Obstacles, []string{"KIND", "PROCESS", "WHAT", "WHAT TO DO"}, func(o *posternv1.KernelObstacle) []string {
		return []string{o.Kind, o.Name, o.What, o.Remedy}
	})
	if err == nil && len(resp.Msg.Obstacles) > 0 {
		return proto.Errorf(proto.CodeInvalid, "kernel %s can't be saved as it is: see the list", id)
	}
	return err
}

func (a *app) kernelCheckpointsCommand() *cobra.Command {
	var protect, release, remove string
	cmd := &cobra.Command{
		Use: "checkpoints KERNEL", Short: "List a kernel's checkpoints, protect or delete one",
		Example: "  postern kernel checkpoints " + exampleKernel + "\n  postern kernel checkpoints " + exampleKernel + " --delete " + exampleCheckpoint,
		Args:    cobra.ExactArgs(1), ValidArgsFunction: a.completeKernels,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				switch {
				case protect != "" || release != "":
					r := &posternv1.ProtectCheckpointRequest{KernelId: args[0], CheckpointId: firstOf(protect, release), On: protect != ""}
					resp, err := c.Checkpoints.ProtectCheckpoint(cmd.Context(), connect.NewRequest(r))
					if err != nil {
						return err
					}
					if r.On {
						return a.done(resp.Msg, "checkpoint %s is protected", r.CheckpointId)
					}
					return a.done(resp.Msg, "checkpoint %s is not protected", r.CheckpointId)
				case remove != "":
					if _, err := c.Checkpoints.DeleteCheckpoint(cmd.Context(), connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: args[0], CheckpointId: remove})); err != nil {
						return err
					}
					return a.done(&posternv1.KernelCheckpoint{Id: remove}, "checkpoint %s is deleted", remove)
				}
				resp, err := c.Checkpoints.ListCheckpoints(cmd.Context(), connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: args[0]}))
				if err != nil {
					return err
				}
				for _, id := range resp.Msg.Damaged {
					a.info("checkpoint %s is damaged on its host and can't be restored", safe(id))
				}
				return printList(a, resp.Msg.Checkpoints, []string{"ID", "TIME", "KIND", "LABEL", "CELL", "PARENT", "SIZE", "STORED", "PROTECTED"}, func(p *posternv1.KernelCheckpoint) []string {
					protected := ""
					if p.Protected {
						protected = "yes"
					}
					return []string{p.Id, timeText(p.Time), p.Kind, firstOf(p.Label, "-"), firstOf(p.Cell, "-"), firstOf(p.Parent, "-"), sizeText(p.Size), sizeText(p.Stored), protected}
				})
			})
		},
	}
	cmd.Flags().StringVar(&protect, "protect", "", "the `CHECKPOINT` is never deleted by the host's limits")
	cmd.Flags().StringVar(&release, "release", "", "the `CHECKPOINT` may be deleted by the host's limits again")
	cmd.Flags().StringVar(&remove, "delete", "", "delete the `CHECKPOINT`")
	cmd.MarkFlagsMutuallyExclusive("protect", "release", "delete")
	return cmd
}

func (a *app) kernelRollbackCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rollback KERNEL CHECKPOINT", Short: "Put a kernel's memory and private files back to a checkpoint",
		Long: `Put a kernel back to one of its checkpoints, as "postern kernel checkpoints KERNEL" lists them. What lies on
workspaces stays as it is: if a file there that was open has another size now, the rollback is refused and names
it, and the kernel goes on as it was.`,
		Example: "  postern kernel rollback " + exampleKernel + " " + exampleCheckpoint, Args: cobra.ExactArgs(2), ValidArgsFunction: a.completeKernels,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Checkpoints.RollbackKernel(cmd.Context(), connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: args[0], CheckpointId: args[1]}))
				if err != nil {
					return err
				}
				a.note(resp.Msg)
				return a.done(resp.Msg, "kernel %s is as it was at %s", args[0], args[1])
			})
		},
	}
}

// note says what is to be known of a restore: that it was eager, and why.
func (a *app) note(k *posternv1.Kernel) {
	if text := k.GetNotice(); text != "" {
		a.info("kernel %s: %s", safe(k.GetId()), safe(text))
	}
}

func (a *app) kernelForkCommand() *cobra.Command {
	return &cobra.Command{
		Use: "fork KERNEL [CHECKPOINT]", Short: "Make a second kernel of a checkpoint, or of a kernel as it is, and print its id",
		Example: "  postern kernel fork " + exampleKernel + "\n  postern kernel fork " + exampleKernel + " " + exampleCheckpoint, Args: cobra.RangeArgs(1, 2), ValidArgsFunction: a.completeKernels,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Checkpoints.ForkKernel(cmd.Context(), connect.NewRequest(&posternv1.ForkKernelRequest{KernelId: args[0], CheckpointId: firstOf(args[1:]...)}))
				if err != nil {
					return err
				}
				a.note(resp.Msg.Kernel)
				return a.done(resp.Msg, "%s", resp.Msg.Kernel.GetId())
			})
		},
	}
}

func (a *app) kernelSuspendCommand() *cobra.Command {
	return &cobra.Command{
		Use: "suspend KERNEL", Short: "Save a kernel and end its processes; it survives a reboot",
		Example: "  postern kernel suspend " + exampleKernel, Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeKernels,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Checkpoints.SuspendKernel(cmd.Context(), connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: args[0]}))
				if err != nil {
					return err
				}
				return a.done(resp.Msg, "kernel %s is suspended", args[0])
			})
		},
	}
}

func (a *app) kernelResumeCommand() *cobra.Command {
	return &cobra.Command{
		Use: "resume KERNEL", Short: "Bring a suspended kernel back",
		Example: "  postern kernel resume " + exampleKernel, Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeKernels,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Checkpoints.ResumeKernel(cmd.Context(), connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: args[0]}))
				if err != nil {
					return err
				}
				state := strings.ToLower(strings.TrimPrefix(resp.Msg.GetState().String(), "KERNEL_STATE_"))
				a.note(resp.Msg)
				return a.done(resp.Msg, "kernel %s is back (%s)", args[0], state)
			})
		},
	}
}
