package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/client/notebookfile"
	"github.com/postern-dev/postern/proto/notebook"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func (a *app) notebookCommand() *cobra.Command {
	return group("notebook", "Run notebook files on hosts", a.notebookRunCommand(), a.notebookWatchCommand(), a.notebookHistoryCommand())
}

// where is where a notebook runs.
type where struct {
	agent, spec string
	mounts      []string
}

func (w *where) flags(a *app, cmd *cobra.Command) {
	cmd.Flags().StringVar(&w.agent, "agent", "", "the agent to run on (required)")
	cmd.Flags().StringVar(&w.spec, "spec", "", "kernelspec (default: the file's, if the agent has it, else the agent's own)")
	cmd.Flags().StringArrayVar(&w.mounts, "mount", nil, "a workspace to mount, WORKSPACE or WORKSPACE:ro; may be repeated")
	cmd.MarkFlagRequired("agent")                                                                     //nolint:errcheck // fails on unknown flags alone
	cmd.RegisterFlagCompletionFunc("agent", a.completeAgents)                                         //nolint:errcheck // likewise
	cmd.RegisterFlagCompletionFunc("spec", a.completeSpecs(func([]string) string { return w.agent })) //nolint:errcheck // likewise
	cmd.ValidArgsFunction = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return []string{"ipynb"}, cobra.ShellCompDirectiveFilterFileExt
	}
}

// start starts a kernel for a notebook.
func (w *where) start(ctx context.Context, a *app, c *client.Client, d *notebook.Document) (*notebookKernel, error) {
	request := &posternv1.StartAgentKernelRequest{Agent: w.agent, Spec: w.spec}
	for _, text := range w.mounts {
		m, err := parseMount(text)
		if err != nil {
			return nil, err
		}
		request.Mounts = append(request.Mounts, m)
	}
	if w.spec == "" && d.Spec != "" {
		specs, err := c.Kernels.ListKernelSpecs(ctx, connect.NewRequest(&posternv1.ListAgentKernelSpecsRequest{Agent: w.agent}))
		if err != nil {
			return nil, err
		}
		for _, s := range specs.Msg.Specs {
			if s.Name == d.Spec {
				request.Spec = s.Name
			}
		}
		if request.Spec == "" {
			a.info("the agent has no kernelspec %q, which the notebook asks for: its default %s is taken", d.Spec, specs.Msg.Default)
		}
	}
	resp, err := c.Kernels.StartKernel(ctx, connect.NewRequest(request))
	if err != nil {
		return nil, err
	}
	return &notebookKernel{a: a, c: c, agent: resp.Msg.Agent, id: resp.Msg.Kernel.GetId()}, nil
}

// stop stops a kernel that was started for a notebook, whatever became of ctx.
func (k *notebookKernel) stop(ctx context.Context) {
	k.close()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if _, err := k.c.Kernels.StopKernel(ctx, connect.NewRequest(&posternv1.AgentKernelRequest{KernelId: k.id})); err != nil {
		k.a.info("kernel %s was not stopped: %s", k.id, message(err))
	}
}

// progress tells of a run on stderr, a line each.
func (a *app) notebookProgress() notebook.Progress {
	return notebook.Progress{
		Cell: func(cell, of int, took time.Duration, failed error) {
			switch {
			case took == 0:
			case failed != nil:
				a.info("cell %d of %d: failed after %s", cell, of, round(took))
			default:
				a.info("cell %d of %d: done in %s", cell, of, round(took))
			}
		},
		Rollback: func(cell int, id string, took time.Duration) {
			switch {
			case id == "":
				a.info("the kernel was restarted (%s)", round(took))
			case cell == 0:
				a.info("back to the start (%s)", round(took))
			default:
				a.info("back to the state after cell %d (%s)", cell, round(took))
			}
		},
		Note: func(line string) { a.info("%s", line) },
	}
}

func round(d time.Duration) time.Duration {
	if d < time.Second {
		return d.Round(time.Millisecond)
	}
	return d.Round(100 * time.Millisecond)
}

func (a *app) notebookRunCommand() *cobra.Command {
	var w where
	var o notebook.Options
	var output string
	cmd := &cobra.Command{
		Use: "run FILE.ipynb --agent AGENT", Short: "Run a notebook once and write its outputs into the file",
		Long: `Runs the code cells of a notebook from the first to the last in a new kernel, which is stopped
at the end, and writes their outputs into the file (or another: --output). A cell that fails ends the run; the
outputs so far are written, and the exit code is 1. Ctrl-C interrupts the cell and ends the run.`,
		Example: "  postern notebook run report.ipynb --agent edge-1\n  postern notebook run report.ipynb --agent edge-1 --output done.ipynb --timeout 10m",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := notebookfile.Read(args[0])
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				k, err := w.start(cmd.Context(), a, c, d)
				if err != nil {
					return err
				}
				defer k.stop(cmd.Context())
				if err := k.attach(cmd.Context()); err != nil {
					return err
				}
				o.Progress = a.notebookProgress()
				results, failed := notebook.Run(cmd.Context(), k, d, o)
				for _, i := range d.Code() { // what did not run has no outputs
					if _, ran := results[i]; !ran {
						results[i] = notebook.Result{}
					}
				}
				if err := writeNotebook(args[0], output, d, results); err != nil {
					return errors.Join(failed, err)
				}
				return failed
			})
		},
	}
	w.flags(a, cmd)
	cmd.Flags().BoolVar(&o.AllowErrors, "allow-errors", false, "go on after a cell that fails; the exit code is 1 all the same")
	cmd.Flags().DurationVar(&o.Timeout, "timeout", 0, "how long a cell may run, such as 10m (default: as long as it takes)")
	cmd.Flags().StringVar(&output, "output", "", "write to this file and leave FILE.ipynb as it is")
	return cmd
}

// writeNotebook writes a document with its results to output, or in place if that is "".
func writeNotebook(file, output string, d *notebook.Document, results map[int]notebook.Result) error {
	text, err := d.With(results)
	if err != nil {
		return err
	}
	if output == "" || output == file {
		err := notebookfile.Replace(file, d.Bytes(), text)
		if errors.Is(err, notebookfile.ErrChanged) {
			// Nothing is lost: neither what the editor saved nor what was computed.
			other := file + ".outputs"
			if err := os.WriteFile(other, text, 0o600); err != nil {
				return err
			}
			return fmt.Errorf("%s was changed while it ran: the outputs are in %s", file, other)
		}
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(output), "."+filepath.Base(output)+".*.tmp")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(text)
	if err = errors.Join(err, tmp.Chmod(0o644), tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), output)
}
