package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/client/notebookfile"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/notebook"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// watched is what is remembered of a notebook between watches: which kernel is its
// own, and of which cells its checkpoints are the state.
type watched struct {
	File   string        `json:"file"`
	Agent  string        `json:"agent"`
	Kernel string        `json:"kernel"`
	Spec   string        `json:"spec"`
	Base   string        `json:"base,omitempty"`
	Steps  []watchedStep `json:"steps,omitempty"`
}

type watchedStep struct {
	State      string `json:"state"` // hex
	Checkpoint string `json:"checkpoint"`
}

// maxWatched bounds such a file, in bytes.
const maxWatched = 16 << 20

// watchedFile is where that is kept: $XDG_STATE_HOME/postern/notebooks, mode 0600.
func (a *app) watchedFile(file, agent string) (string, error) {
	dir := a.getenv("XDG_STATE_HOME")
	if dir == "" {
		home := a.getenv("HOME")
		if home == "" {
			return "", usagef("HOME is not set: set it or XDG_STATE_HOME, for what is remembered of a watched notebook")
		}
		dir = filepath.Join(home, ".local", "state")
	}
	full, err := filepath.Abs(file)
	if err == nil {
		full, err = filepath.EvalSymlinks(full)
	}
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(full + "\x00" + agent))
	return filepath.Join(dir, "postern", "notebooks", hex.EncodeToString(sum[:12])+".json"), nil
}

func readWatched(path string) (*watched, error) {
	text, err := readSmall(path, maxWatched)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var w watched
	if err := json.Unmarshal(text, &w); err != nil {
		return nil, fmt.Errorf("%s: %w: remove it to begin anew", path, err)
	}
	return &w, nil
}

func (w *watched) write(path string) error {
	text, err := json.MarshalIndent(w, "", " ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(text)
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

// remember notes a session.
func (w *watched) remember(s *notebook.Session) {
	w.Base, w.Steps = s.Base, nil
	for _, step := range s.Steps {
		w.Steps = append(w.Steps, watchedStep{hex.EncodeToString(step.State[:]), step.Checkpoint})
	}
}

// recall gives a session the steps whose checkpoints are still there.
func (w *watched) recall(s *notebook.Session, there []*posternv1.KernelCheckpoint) {
	exists := func(id string) bool {
		return slices.ContainsFunc(there, func(p *posternv1.KernelCheckpoint) bool { return p.Id == id })
	}
	if exists(w.Base) {
		s.Base = w.Base
	}
	for _, step := range w.Steps {
		raw, err := hex.DecodeString(step.State)
		if err != nil || len(raw) != len(notebook.State{}) {
			return
		}
		one := notebook.Step{State: notebook.State(raw)}
		if exists(step.Checkpoint) {
			one.Checkpoint = step.Checkpoint
		}
		s.Steps = append(s.Steps, one)
	}
}

// plainKernel is a kernel without checkpoints: every edit runs all cells again.
type plainKernel struct{ *notebookKernel }

// Checkpoint implements notebook.Checkpointer: it keeps nothing.
func (plainKernel) Checkpoint(context.Context, string) (string, error) { return "", nil }

func (a *app) notebookWatchCommand() *cobra.Command {
	var w where
	var plain, stop bool
	cmd := &cobra.Command{
		Use: "watch FILE.ipynb --agent AGENT", Short: "Keep a notebook's outputs in step with its cells while you edit it",
		Long: `Runs a notebook that you keep in any editor. After each cell the kernel is checkpointed. When
the file is saved with a cell changed, added, moved or removed, the kernel goes back to the state before the
first such cell, and only it and those below run again. Outputs are written into the file; what the
editor saves meanwhile is never overwritten.

Ctrl-C suspends the kernel on its host; the next watch of the same file goes on where it was, also after
days or a restart of the host. A cell that fails is run again when something at or above it changes.`,
		Example: "  postern notebook watch report.ipynb --agent edge-1",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error { return a.watchNotebook(cmd.Context(), c, args[0], &w, plain, stop) })
		},
	}
	w.flags(a, cmd)
	cmd.Flags().BoolVar(&plain, "no-checkpoints", false, "for hosts without CRIU: restart the kernel and run every cell again on each change")
	cmd.Flags().BoolVar(&stop, "stop", false, "stop the kernel at the end; its checkpoints go with it")
	return cmd
}

func (a *app) watchNotebook(ctx context.Context, c *client.Client, file string, w *where, plain, stop bool) error {
	d, err := notebookfile.Read(file)
	if err != nil {
		return err
	}
	place, err := a.watchedFile(file, w.agent)
	if err != nil {
		return err
	}
	known, err := readWatched(place)
	if err != nil {
		return err
	}
	// Until the kernel is there Ctrl-C ends the program; then it ends the watch.
	s := &notebook.Session{Options: notebook.Options{Progress: a.notebookProgress()}}
	k, err := a.returnTo(ctx, c, known, s)
	if err != nil {
		return err
	}
	if k == nil {
		if k, err = w.start(ctx, a, c, d); err != nil {
			return err
		}
		known = &watched{File: file, Agent: w.agent, Kernel: k.id, Spec: d.Spec}
	}
	defer k.close()
	if err := k.attach(ctx); err != nil {
		return err
	}
	if err := k.ready(ctx); err != nil {
		return err
	}
	s.Spec, s.Kernel, s.Checkpoints = known.Spec, k, k
	if plain {
		s.Checkpoints = plainKernel{k}
	} else if s.Base == "" && len(s.Steps) == 0 {
		if s.Base, err = k.Checkpoint(ctx, notebook.Start(s.Spec).String()); err != nil {
			k.stop(ctx)
			return fmt.Errorf("the host can't checkpoint kernels: %w (--no-checkpoints does without, and runs every cell again on each change)", err)
		}
	}
	s.Changed = func() {
		known.remember(s)
		if err := known.write(place); err != nil {
			a.info("what is known of the notebook's kernel was not kept: %v", err)
		}
	}
	s.Changed()
	a.info("watching %s on kernel %s: Ctrl-C ends it", file, k.id)
	err = notebookfile.Watch(ctx, s, file)
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		err = nil
	}
	return errors.Join(err, a.leave(ctx, k, s, place, plain || stop))
}

// returnTo finds the kernel of an earlier watch; nil if it is gone.
func (a *app) returnTo(ctx context.Context, c *client.Client, known *watched, s *notebook.Session) (*notebookKernel, error) {
	if known == nil {
		return nil, nil
	}
	found, err := c.Kernels.GetKernel(ctx, connect.NewRequest(&posternv1.AgentKernelRequest{KernelId: known.Kernel}))
	if proto.CodeOf(err) == proto.CodeNotFound {
		a.info("the kernel of the last watch is gone: every cell runs again")
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	k := &notebookKernel{a: a, c: c, agent: found.Msg.Agent, id: known.Kernel}
	there, err := c.Checkpoints.ListCheckpoints(ctx, connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: k.id}))
	if err != nil {
		return nil, err
	}
	known.recall(s, there.Msg.Checkpoints)
	// What others ran in it since is not known.
	s.Dirty = true
	switch found.Msg.Kernel.GetState() {
	case posternv1.KernelState_KERNEL_STATE_SUSPENDED:
		began := time.Now()
		if _, err := c.Checkpoints.ResumeKernel(ctx, connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: k.id})); err != nil {
			return nil, fmt.Errorf("resume kernel %s: %w", k.id, err)
		}
		a.info("the kernel is back from its host's disk (%s)", round(time.Since(began)))
	case posternv1.KernelState_KERNEL_STATE_DEAD:
		if err := k.Restart(ctx); err != nil {
			return nil, err
		}
	}
	return k, nil
}

// leave ends a watch: the kernel waits on its host's disk, or is stopped.
func (a *app) leave(ctx context.Context, k *notebookKernel, s *notebook.Session, place string, stop bool) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
	defer cancel()
	if stop {
		k.stop(ctx)
		return os.Remove(place)
	}
	if s.Dirty && s.Base != "" { // a half-run cell is of no use
		if id := s.Newest(); id != "" {
			if err := k.Rollback(ctx, id); err != nil {
				a.info("the kernel was not taken back to its last good state: %s", message(err))
			}
		}
	}
	if _, err := k.c.Checkpoints.SuspendKernel(ctx, connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: k.id})); err != nil {
		return fmt.Errorf("kernel %s goes on, it was not suspended: %w", k.id, err)
	}
	a.info("the kernel is suspended: the next watch of this file goes on with it (postern kernel stop %s ends it)", k.id)
	return nil
}

func (a *app) notebookHistoryCommand() *cobra.Command {
	var agent string
	cmd := &cobra.Command{
		Use: "history FILE.ipynb|KERNEL", Short: "Show the checkpoints of a notebook's kernel as a tree",
		Example: "  postern notebook history report.ipynb --agent edge-1\n  postern notebook history " + exampleKernel,
		Args:    cobra.ExactArgs(1), ValidArgsFunction: a.completeKernels,
		RunE: func(cmd *cobra.Command, args []string) error {
			id := args[0]
			var states map[string]string
			if strings.HasSuffix(id, ".ipynb") {
				if agent == "" {
					return usagef("of which agent? add --agent AGENT")
				}
				place, err := a.watchedFile(id, agent)
				if err != nil {
					return err
				}
				known, err := readWatched(place)
				if err != nil {
					return err
				}
				if known == nil {
					return proto.Errorf(proto.CodeNotFound, "%s was not watched on %s from here", id, agent)
				}
				states = known.labels(args[0])
				id = known.Kernel
			}
			return a.with(func(c *client.Client) error { return a.showHistory(cmd.Context(), c, id, states) })
		},
	}
	cmd.Flags().StringVar(&agent, "agent", "", "the agent that the notebook was watched on")
	cmd.RegisterFlagCompletionFunc("agent", a.completeAgents) //nolint:errcheck // fails on unknown flags alone
	return cmd
}

// labels says what the checkpoints of the file as it is now are the state after.
func (w *watched) labels(file string) map[string]string {
	out := map[string]string{w.Base: "start"}
	d, err := notebookfile.Read(file)
	if err != nil {
		return out // the tree alone
	}
	var texts []string
	var cells []int
	for n, i := range d.Code() {
		if strings.TrimSpace(d.Cells[i].Source) != "" {
			texts, cells = append(texts, d.Cells[i].Source), append(cells, n+1)
		}
	}
	chain := notebook.Chain(w.Spec, texts)
	for n, step := range w.Steps {
		if n+1 < len(chain) && hex.EncodeToString(chain[n+1][:]) == step.State {
			out[step.Checkpoint] = fmt.Sprintf("after cell %d", cells[n])
		}
	}
	return out
}

// showHistory prints checkpoints, each below the one that it descends from.
func (a *app) showHistory(ctx context.Context, c *client.Client, id string, states map[string]string) error {
	resp, err := c.Checkpoints.ListCheckpoints(ctx, connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: id}))
	if err != nil {
		return err
	}
	all := resp.Msg.Checkpoints
	slices.SortFunc(all, func(x, y *posternv1.KernelCheckpoint) int { return x.Time.AsTime().Compare(y.Time.AsTime()) })
	below := map[string][]*posternv1.KernelCheckpoint{}
	for _, p := range all {
		parent := p.Parent
		if !slices.ContainsFunc(all, func(other *posternv1.KernelCheckpoint) bool { return other.Id == parent }) {
			parent = ""
		}
		below[parent] = append(below[parent], p)
	}
	depth := map[string]int{}
	var ordered []*posternv1.KernelCheckpoint
	// A chain of thousands is no reason to recurse.
	todo := slices.Clone(below[""])
	slices.Reverse(todo)
	for len(todo) > 0 {
		p := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		ordered = append(ordered, p)
		children := slices.Clone(below[p.Id])
		slices.Reverse(children)
		for _, child := range children {
			depth[child.Id] = depth[p.Id]
			if len(children) > 1 { // a branch; a line of descent stays where it is
				depth[child.Id]++
			}
		}
		todo = append(todo, children...)
	}
	return printList(a, ordered, []string{"CHECKPOINT", "TIME", "STATE", "STORED", "PROTECTED"}, func(p *posternv1.KernelCheckpoint) []string {
		protected := ""
		if p.Protected {
			protected = "yes"
		}
		state := states[p.Id]
		if state == "" && !strings.HasPrefix(p.Label, notebookLabel) {
			state = p.Label
		}
		return []string{strings.Repeat("  ", depth[p.Id]) + p.Id, timeText(p.Time), firstOf(state, p.Kind), sizeText(p.Stored), protected}
	})
}
