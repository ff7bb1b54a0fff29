package notebook

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Checkpointer keeps states of the kernel and goes back to them.
type Checkpointer interface {
	// Checkpoint keeps the kernel's state under a label (at most 64 characters) and
	// returns its id.
	Checkpoint(ctx context.Context, label string) (id string, err error)
	// Rollback takes the kernel back to a state.
	Rollback(ctx context.Context, id string) error
	// Restart gives a kernel on which nothing ran.
	Restart(ctx context.Context) error
}

// Step is a code cell that ran to its end, with the state after it.
type Step struct {
	State State
	// Checkpoint is the id of the state; "" where none was kept.
	Checkpoint string
	Result     Result
	// Known is false for a step of an earlier watch, whose result only the file has.
	Known bool
}

// Session is a notebook whose kernel follows its text. The kernel's state is that
// after the last of Steps, or, when Dirty, one that is good for nothing.
type Session struct {
	Kernel      Kernel
	Checkpoints Checkpointer
	// Spec is the kernelspec's name.
	Spec string
	// Base is the checkpoint of the kernel on which nothing ran; "" if there is none.
	Base  string
	Steps []Step
	Dirty bool

	Options Options
	// Changed is called when Steps, Base or Dirty have changed; nil: not.
	Changed func()

	// failed is the cell that failed last in the state after Steps, to run again only
	// when something changed.
	failed *failedCell
}

type failedCell struct {
	state  State
	result Result
	err    *CellError
}

func (s *Session) chain() []State {
	states := []State{Start(s.Spec)}
	for _, step := range s.Steps {
		states = append(states, step.State)
	}
	return states
}

// sources are the sources of a document's code cells that have something to run, with
// their indexes.
func sources(d *Document) (texts []string, indexes []int) {
	for _, i := range d.Code() {
		if !blank(d.Cells[i].Source) {
			texts, indexes = append(texts, d.Cells[i].Source), append(indexes, i)
		}
	}
	return texts, indexes
}

// Stale says what a document asks of the session: how many of its cells stand as
// they are, and how many have to run.
func (s *Session) Stale(d *Document) (keep, run int) {
	texts, _ := sources(d)
	keep = Common(s.chain(), Chain(s.Spec, texts))
	return keep, len(texts) - keep
}

// Done reports whether the kernel's state is that of the document, or its first cell
// that is not has failed as it stands.
func (s *Session) Done(d *Document) bool {
	keep, run := s.Stale(d)
	if s.Dirty && s.failed == nil || keep < len(s.Steps) {
		return false
	}
	if run == 0 {
		return s.failed == nil
	}
	texts, _ := sources(d)
	return s.failed != nil && s.failed.state == Chain(s.Spec, texts)[keep+1]
}

// Step brings the kernel one step nearer to the document: back to the last state that
// they have in common, and one cell on from there. It returns the results by index
// that the file should show now: nothing for cells whose results only the file has,
// and empty ones for cells that have not run yet. A cell that failed is a *CellError;
// other errors leave the session Dirty, so that the next Step goes back first. Unlike
// Run it lets no cell change what an earlier one displayed.
func (s *Session) Step(ctx context.Context, d *Document) (map[int]Result, error) {
	texts, indexes := sources(d)
	want := Chain(s.Spec, texts)
	keep := Common(s.chain(), want)
	if keep < len(s.Steps) || s.Dirty {
		if err := s.back(ctx, keep); err != nil {
			return nil, err
		}
		keep = len(s.Steps)
	}
	if keep == len(texts) {
		return s.Results(d), nil
	}
	state := want[keep+1]
	s.Dirty, s.failed = true, nil
	r, err := runCell(ctx, s.Kernel, texts[keep], slices.Index(d.Code(), indexes[keep])+1, indexes[keep], len(d.Code()), s.Options, displays{})
	if s.Options.Changed != nil {
		s.Options.Changed(indexes[keep], r)
	}
	if s.Options.Forget {
		r = Result{}
	}
	var failed *CellError
	if errors.As(err, &failed) {
		s.failed = &failedCell{state, r, failed}
		return s.Results(d), err
	}
	if err != nil {
		return s.Results(d), err
	}
	step := Step{State: state, Result: r, Known: !s.Options.Forget}
	began := time.Now()
	if step.Checkpoint, err = s.Checkpoints.Checkpoint(ctx, state.String()); err != nil {
		// The cell has run; without its checkpoint a later edit goes back further.
		s.Options.Progress.Notef("no checkpoint after code cell %d: %v", keep+1, err)
	} else if s.Options.Progress.Checkpoint != nil && step.Checkpoint != "" {
		s.Options.Progress.Checkpoint(keep+1, step.Checkpoint, time.Since(began))
	}
	s.Steps, s.Dirty = append(s.Steps, step), false
	s.changed()
	return s.Results(d), ctx.Err()
}

// back takes the kernel to the state after the newest of the first n steps that has a
// checkpoint, or to one on which nothing ran.
func (s *Session) back(ctx context.Context, n int) error {
	for ; n > 0; n-- {
		if s.Steps[n-1].Checkpoint != "" {
			break
		}
	}
	id := s.Base
	if n > 0 {
		id = s.Steps[n-1].Checkpoint
	}
	s.Dirty, s.failed = true, nil
	began := time.Now()
	if id != "" {
		if err := s.Checkpoints.Rollback(ctx, id); err != nil {
			return fmt.Errorf("going back to the state after code cell %d: %w", n, err)
		}
	} else {
		if err := s.Checkpoints.Restart(ctx); err != nil {
			return fmt.Errorf("restarting the kernel: %w", err)
		}
	}
	if s.Options.Progress.Rollback != nil {
		s.Options.Progress.Rollback(n, id, time.Since(began))
	}
	s.Steps, s.Dirty = s.Steps[:n], false
	s.changed()
	return nil
}

func (s *Session) changed() {
	if s.Changed != nil {
		s.Changed()
	}
}

// Results are what a file should show of the code cells, by index: nothing for cells
// whose results only the file has, and empty ones for cells that have not run yet.
func (s *Session) Results(d *Document) map[int]Result {
	texts, indexes := sources(d)
	want := Chain(s.Spec, texts)
	keep := Common(s.chain(), want)
	results := map[int]Result{}
	for _, i := range d.Code() {
		results[i] = Result{}
	}
	for n, index := range indexes {
		switch {
		case n < keep && s.Steps[n].Known:
			results[index] = s.Steps[n].Result
		case n < keep:
			delete(results, index)
		case n == keep && s.failed != nil && s.failed.state == want[n+1]:
			results[index] = s.failed.result
		}
	}
	return results
}

// Failed is the cell that failed as it stands in the state after Steps; nil: none did.
func (s *Session) Failed() *CellError {
	if s.failed == nil {
		return nil
	}
	return s.failed.err
}

// Newest is the checkpoint that the kernel's state is, or descends from; "" if there is none.
func (s *Session) Newest() string {
	for _, step := range slices.Backward(s.Steps) {
		if step.Checkpoint != "" {
			return step.Checkpoint
		}
	}
	return s.Base
}

// Recall takes over the steps of an earlier session, as far as they are a document's and
// their checkpoints are there: kept are the ids of checkpoints by their labels, as
// Checkpointer got them. What ran in the kernel since is not known, so it is Dirty.
func (s *Session) Recall(d *Document, kept map[string]string) {
	texts, _ := sources(d)
	chain := Chain(s.Spec, texts)
	s.Base, s.Steps, s.Dirty, s.failed = kept[chain[0].String()], nil, true, nil
	newest := 0
	for n, state := range chain[1:] {
		if kept[state.String()] != "" {
			newest = n + 1
		}
	}
	for _, state := range chain[1 : newest+1] {
		s.Steps = append(s.Steps, Step{State: state, Checkpoint: kept[state.String()]})
	}
}

// Running is the state that the cell which Step would run for this document leads to;
// false if none has to run.
func (s *Session) Running(d *Document) (State, bool) {
	texts, _ := sources(d)
	want := Chain(s.Spec, texts)
	keep := Common(s.chain(), want)
	if keep == len(texts) {
		return State{}, false
	}
	return want[keep+1], true
}

// Wanted reports whether a state is on a document's way.
func Wanted(spec string, d *Document, state State) bool {
	texts, _ := sources(d)
	return slices.Contains(Chain(spec, texts), state)
}
