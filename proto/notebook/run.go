package notebook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Kernel is what runs cells. One cell at a time.
type Kernel interface {
	// Execute runs code and returns when the kernel has answered and is idle again.
	// take is called, in order, with each message of the iopub channel that answers
	// the request. When ctx ends the cell is interrupted, and Execute still waits for
	// the kernel a while.
	Execute(ctx context.Context, code string, take func(*posternv1.KernelMessage)) (Reply, error)
}

// Reply is a kernel's answer to an execute request.
type Reply struct {
	// Status is ok, error or aborted.
	Status string
	// Count is the execution count.
	Count int
	// Class and Value are the exception's, with status error.
	Class, Value string
}

// ParseReply reads the content of an execute_reply.
func ParseReply(content []byte) (Reply, error) {
	var c struct {
		Status string `json:"status"`
		Count  int    `json:"execution_count"`
		Class  string `json:"ename"`
		Value  string `json:"evalue"`
	}
	if err := json.Unmarshal(content, &c); err != nil {
		return Reply{}, fmt.Errorf("the kernel's answer makes no sense: %w", err)
	}
	return Reply{Status: c.Status, Count: c.Count, Class: c.Class, Value: c.Value}, nil
}

// CellError says that a cell failed.
type CellError struct {
	// Cell counts code cells from 1; Index is the cell's place in the file, from 0.
	Cell, Index  int
	Class, Value string
}

// Error implements error.
func (e *CellError) Error() string {
	if e.Class == "" {
		return fmt.Sprintf("code cell %d failed", e.Cell)
	}
	value := e.Value
	if len(value) > 300 {
		value = value[:300] + "..."
	}
	return fmt.Sprintf("code cell %d failed: %s: %s", e.Cell, e.Class, value)
}

// Progress is told of what happens, in order. Any of its functions may be nil.
type Progress struct {
	// Cell is called before a code cell runs and after it ran (took is 0 before).
	Cell func(cell, of int, took time.Duration, failed error)
	// Checkpoint is called when the state after a number of code cells was kept.
	Checkpoint func(cell int, id string, took time.Duration)
	// Rollback is called when the kernel went back to the state after a number of cells.
	Rollback func(cell int, id string, took time.Duration)
	// Saved is called when outputs were written to the file.
	Saved func()
	// Note is one line for the user.
	Note func(line string)
}

func (p Progress) cell(cell, of int, took time.Duration, failed error) {
	if p.Cell != nil {
		p.Cell(cell, of, took, failed)
	}
}

// Notef calls Note, if there is one.
func (p Progress) Notef(format string, args ...any) {
	if p.Note != nil {
		p.Note(fmt.Sprintf(format, args...))
	}
}

// Options are how a notebook is run.
type Options struct {
	// AllowErrors goes on after a cell that failed.
	AllowErrors bool
	// Timeout bounds each cell; 0: none. A cell over it is interrupted and has failed.
	Timeout  time.Duration
	Progress Progress
	// Changed is called after each cell with what there is of its results; nil: not.
	Changed func(index int, r Result)
	// MaxOutput bounds what is kept of a cell's outputs, in bytes; 0: MaxOutput.
	MaxOutput int
	// Forget keeps no results in memory: Changed is told of them. Then no cell changes what
	// an earlier one has displayed.
	Forget bool
}

// Run runs the code cells of a document in order. The results are by the cells' index
// in the document, and are there with an error too: those of the cells that ran. The
// error is a *CellError when a cell failed.
func Run(ctx context.Context, k Kernel, d *Document, o Options) (map[int]Result, error) {
	results := map[int]Result{}
	code := d.Code()
	var first error
	shown := displays{}
	for n, index := range code {
		c := d.Cells[index]
		if blank(c.Source) {
			results[index] = Result{}
			continue
		}
		r, err := runCell(ctx, k, c.Source, n+1, index, len(code), o, shown)
		results[index] = r
		for other, out := range shown {
			if results[other].Outputs != nil && other != index {
				results[other] = Result{Count: results[other].Count, Outputs: out.List()}
			}
		}
		if o.Changed != nil {
			o.Changed(index, r)
		}
		if o.Forget {
			results[index] = Result{}
			clear(shown)
		}
		var failed *CellError
		switch {
		case errors.As(err, &failed) && o.AllowErrors:
			if first == nil {
				first = err
			}
		case err != nil:
			return results, err
		}
	}
	return results, first
}

// displays are the outputs of the cells that ran, by index: a later cell may update
// what an earlier one displayed.
type displays map[int]*Outputs

// runCell runs one cell: the cell-th code cell, at index in the file.
func runCell(ctx context.Context, k Kernel, source string, cell, index, of int, o Options, shown displays) (Result, error) {
	o.Progress.cell(cell, of, 0, nil)
	began := time.Now()
	out := &Outputs{most: o.MaxOutput}
	var broken error
	limit, cancel := ctx, context.CancelFunc(func() {})
	if o.Timeout > 0 {
		limit, cancel = context.WithTimeout(ctx, o.Timeout)
	}
	defer cancel()
	reply, err := k.Execute(limit, source, func(m *posternv1.KernelMessage) {
		if _, err := out.Take(m); err != nil && broken == nil {
			broken = err
		}
		for other, earlier := range shown {
			if other != index {
				earlier.refresh(m)
			}
		}
	})
	shown[index] = out
	r := Result{Count: max(out.Count(), reply.Count), Outputs: out.List()}
	switch {
	case ctx.Err() != nil && reply.Status != "ok":
		err = context.Cause(ctx)
	case errors.Is(limit.Err(), context.DeadlineExceeded):
		err = &CellError{Cell: cell, Index: index, Class: "timeout", Value: fmt.Sprintf("it ran longer than %s and was interrupted", o.Timeout)}
	case err != nil:
	case broken != nil:
		err = broken
	case reply.Status != "ok":
		err = &CellError{Cell: cell, Index: index, Class: reply.Class, Value: reply.Value}
	}
	o.Progress.cell(cell, of, max(time.Since(began), 1), err)
	return r, err
}

// refresh takes what a later cell's message changes here: displays under an id.
func (o *Outputs) refresh(m *posternv1.KernelMessage) {
	if h, err := jupyter.ParseHeader(m.GetHeader()); err == nil && h.Type == "update_display_data" {
		_, _ = o.Take(m) // the cell that it answers has reported what is wrong with it
	}
}

// blank reports whether a cell has nothing to run: Jupyter sends no such cell.
func blank(source string) bool {
	for _, r := range source {
		if r != ' ' && r != '\t' && r != '\n' && r != '\r' {
			return false
		}
	}
	return true
}
