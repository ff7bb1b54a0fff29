package main

import (
	"context"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func (a *app) kernelCommand() *cobra.Command {
	list := &cobra.Command{
		Use: "list [AGENT]", Short: "List kernels, of all agents or one", Example: "  postern kernel list", Args: cobra.MaximumNArgs(1), ValidArgsFunction: a.completeAgents,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error { return a.listKernels(cmd.Context(), c, firstOf(args...)) })
		},
	}
	specs := &cobra.Command{
		Use: "specs AGENT", Short: "List the kernelspecs that an agent offers", Example: "  postern kernel specs edge-1", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeAgents,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Kernels.ListKernelSpecs(cmd.Context(), connect.NewRequest(&posternv1.ListAgentKernelSpecsRequest{Agent: args[0]}))
				if err != nil {
					return err
				}
				return printList(a, resp.Msg.Specs, []string{"NAME", "LANGUAGE", "DISPLAY NAME", "DEFAULT"}, func(s *posternv1.KernelSpec) []string {
					byDefault := ""
					if s.Name == resp.Msg.Default {
						byDefault = "yes"
					}
					return []string{s.Name, s.Language, s.DisplayName, byDefault}
				})
			})
		},
	}
	interrupt := a.kernelChange("interrupt", "Interrupt what a kernel runs", "was interrupted",
		func(ctx context.Context, c *client.Client, r *connect.Request[posternv1.AgentKernelRequest]) (*connect.Response[posternv1.AgentKernel], error) {
			return c.Kernels.InterruptKernel(ctx, r)
		})
	restart := a.kernelChange("restart", "End a kernel's processes and start them anew; its variables are gone", "was restarted",
		func(ctx context.Context, c *client.Client, r *connect.Request[posternv1.AgentKernelRequest]) (*connect.Response[posternv1.AgentKernel], error) {
			return c.Kernels.RestartKernel(ctx, r)
		})
	stop := &cobra.Command{
		Use: "stop KERNEL...", Short: "Stop kernels", Example: "  postern kernel stop 01a20249-8294-70e3-b8c2-6b2fc9eebe2f", Args: cobra.MinimumNArgs(1), ValidArgsFunction: a.completeKernels,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				for _, id := range args {
					if _, err := c.Kernels.StopKernel(cmd.Context(), connect.NewRequest(&posternv1.AgentKernelRequest{KernelId: id})); err != nil {
						return err
					}
					if err := a.done(&posternv1.Kernel{Id: id}, "kernel %s is stopped", id); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	return group("kernel", "Run code on hosts, in Jupyter kernels", a.kernelStartCommand(), a.kernelExecCommand(), list, specs, interrupt, restart, stop, a.kernelCheckpointCommand(), a.kernelCheckpointsCommand(), a.kernelRollbackCommand(), a.kernelForkCommand(), a.kernelSuspendCommand(), a.kernelResumeCommand(), a.kernelMoveCommand(), a.kernelBridgeCommand())
}

func (a *app) kernelChange(name, short, done string, do func(context.Context, *client.Client, *connect.Request[posternv1.AgentKernelRequest]) (*connect.Response[posternv1.AgentKernel], error)) *cobra.Command {
	return &cobra.Command{
		Use: name + " KERNEL", Short: short, Example: "  postern kernel " + name + " 01a20249-8294-70e3-b8c2-6b2fc9eebe2f", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeKernels,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := do(cmd.Context(), c, connect.NewRequest(&posternv1.AgentKernelRequest{KernelId: args[0]}))
				if err != nil {
					return err
				}
				return a.done(resp.Msg, "kernel %s %s", args[0], done)
			})
		},
	}
}

func (a *app) kernelStartCommand() *cobra.Command {
	var spec string
	var mounts, secrets []string
	cmd := &cobra.Command{
		Use: "start AGENT", Short: "Start a kernel on an agent and print its id",
		Example: "  postern kernel start edge-1\n  postern kernel start edge-1 --spec python3 --mount reports --mount models:ro",
		Args:    cobra.ExactArgs(1), ValidArgsFunction: a.completeAgents,
		RunE: func(cmd *cobra.Command, args []string) error {
			request := &posternv1.StartAgentKernelRequest{Agent: args[0], Spec: spec, Secrets: secrets}
			for _, text := range mounts {
				m, err := parseMount(text)
				if err != nil {
					return err
				}
				request.Mounts = append(request.Mounts, m)
			}
			return a.with(func(c *client.Client) error {
				resp, err := c.Kernels.StartKernel(cmd.Context(), connect.NewRequest(request))
				if err != nil {
					return err
				}
				for _, warning := range resp.Msg.Warnings {
					a.info("postern: warning: %s", safe(warning))
				}
				return a.done(resp.Msg, "%s", resp.Msg.Kernel.GetId())
			})
		},
	}
	cmd.Flags().StringVar(&spec, "spec", "", "kernelspec, as `postern kernel specs AGENT` lists them (default: the agent's own)")
	cmd.Flags().StringArrayVar(&mounts, "mount", nil, "a workspace to mount, WORKSPACE or WORKSPACE:ro; may be repeated, the first is the working directory")
	cmd.Flags().StringArrayVar(&secrets, "secret", nil, "a secret to grant the kernel, by name; may be repeated (see postern secret)")
	cmd.RegisterFlagCompletionFunc("spec", a.completeSpecs(func(args []string) string { return firstOf(args...) })) //nolint:errcheck // fails on unknown flags alone
	return cmd
}

// parseMount reads WORKSPACE or WORKSPACE:ro.
func parseMount(text string) (*posternv1.KernelMount, error) {
	name, mode, given := strings.Cut(text, ":")
	if name == "" || given && mode != "ro" && mode != "rw" {
		return nil, usagef("--mount is %q: write WORKSPACE or WORKSPACE:ro", text)
	}
	return &posternv1.KernelMount{Workspace: name, ReadOnly: mode == "ro"}, nil
}

func kernelState(k *posternv1.AgentKernel) string {
	if !k.Online {
		return "agent offline"
	}
	return strings.ToLower(strings.TrimPrefix(k.Kernel.GetState().String(), "KERNEL_STATE_"))
}

func (a *app) listKernels(ctx context.Context, c *client.Client, agent string) error {
	resp, err := c.Kernels.ListKernels(ctx, connect.NewRequest(&posternv1.ListAgentKernelsRequest{Agent: agent}))
	if err != nil {
		return err
	}
	for _, silent := range resp.Msg.Silent {
		a.info("agent %s does not answer: its kernels are shown as far as they are known", safe(silent))
	}
	return printList(a, resp.Msg.Kernels, []string{"ID", "AGENT", "SPEC", "STATE", "OWNER", "CLIENTS", "MEMORY", "STARTED", "LAST ACTIVITY", "REASON"}, func(k *posternv1.AgentKernel) []string {
		memory := "-"
		if k.Kernel.GetMemory() > 0 {
			memory = sizeText(k.Kernel.Memory)
		}
		return []string{
			k.Kernel.GetId(), k.Agent, firstOf(k.Kernel.GetSpec(), "-"), kernelState(k), firstOf(k.Kernel.GetOwner().GetTokenName(), "-"), fmt.Sprint(k.Kernel.GetConnections()),
			memory, timeText(k.Kernel.GetStarted()), timeText(k.Kernel.GetLastActivity()), firstOf(k.Kernel.GetReason(), k.Kernel.GetNotice()),
		}
	})
}
