package notebook

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"time"

	"golang.org/x/sync/semaphore"
	gproto "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/notebook"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// queued and queuedBytes bound the events that wait for the caller; of outputs as they
	// come no more than pieceBytes, each of at most pieceMost.
	queued      = 256
	queuedBytes = 16 << 20
	pieceBytes  = 2 << 20
	pieceMost   = 256 << 10
	// slowTime is how long a caller may take nothing.
	slowTime = 30 * time.Second
	// aliveEvery is after how long without an event one says so.
	aliveEvery = 15 * time.Second
)

// event is one that waits for the caller.
type event struct {
	*posternv1.NotebookEvent
	release func()
}

// run is one call: what makes events, and the caller that they are sent to.
type run struct {
	caller Caller
	cells  []*posternv1.NotebookCell
	// ctx ends with the call, or when end says why.
	ctx    context.Context
	end    context.CancelCauseFunc
	events chan event
	// bytes and pieces are places for what waits in events.
	bytes, pieces *semaphore.Weighted
	// told is the failure of a cell that the caller knows; it belongs to work.
	told *notebook.CellError
}

// start begins a run: work runs in a goroutine of its own, and send is called with its
// events. start returns when both have ended.
func (s *Service) start(ctx context.Context, c Caller, cells []*posternv1.NotebookCell, send func(*posternv1.NotebookEvent) error, work func(*run) error) error {
	if err := check(cells); err != nil {
		return err
	}
	r := &run{caller: c, cells: cells, events: make(chan event, queued), bytes: semaphore.NewWeighted(queuedBytes), pieces: semaphore.NewWeighted(pieceBytes)}
	r.ctx, r.end = context.WithCancelCause(ctx)
	defer r.end(nil)
	if err := s.enter(r); err != nil {
		return err
	}
	defer s.leave(r)
	done := make(chan error, 1)
	go func() {
		err := work(r)
		close(r.events)
		done <- err
	}()
	broken := r.pass(send)
	if broken != nil {
		r.end(broken)
		for e := range r.events { // nobody hears what it still has to say
			e.release()
		}
	}
	err := <-done
	cause := context.Cause(r.ctx)
	switch {
	case broken != nil:
		return broken
	case err != nil && cause != nil && !errors.Is(cause, context.Canceled):
		return cause
	}
	return err
}

// pass sends events until there are no more.
func (r *run) pass(send func(*posternv1.NotebookEvent) error) error {
	alive := time.NewTimer(aliveEvery)
	defer alive.Stop()
	for {
		select {
		case e, ok := <-r.events:
			if !ok {
				return nil
			}
			err := send(e.NotebookEvent)
			e.release()
			if err != nil {
				return err
			}
		case <-alive.C:
			if err := send(&posternv1.NotebookEvent{Event: &posternv1.NotebookEvent_Alive{Alive: &posternv1.NotebookAlive{}}}); err != nil {
				return err
			}
		}
		alive.Reset(aliveEvery)
	}
}

// emit hands an event over. A caller that takes none for a while ends the run.
func (r *run) emit(e *posternv1.NotebookEvent) {
	size := int64(min(gproto.Size(e)+64, queuedBytes))
	// Not r's own context: a run that was ended still says how.
	slow, cancel := context.WithTimeout(context.Background(), slowTime)
	defer cancel()
	if r.bytes.Acquire(slow, size) == nil {
		select {
		case r.events <- event{e, func() { r.bytes.Release(size) }}:
			return
		case <-slow.Done():
		}
		r.bytes.Release(size)
	}
	r.end(proto.Errorf(proto.CodeCancelled, "the caller took no event for %s", slowTime))
}

// offer hands an output over as it comes, if the caller keeps up.
func (r *run) offer(e *posternv1.NotebookEvent) {
	size := int64(gproto.Size(e) + 64)
	if len(r.events) > queued/2 || size > pieceMost || !r.pieces.TryAcquire(size) {
		return // the end of the cell has it
	}
	select {
	case r.events <- event{e, func() { r.pieces.Release(size) }}:
	default:
		r.pieces.Release(size)
	}
}

func (r *run) note(text string) {
	r.emit(&posternv1.NotebookEvent{Event: &posternv1.NotebookEvent_Note{Note: strings.ToValidUTF8(text, "\uFFFD")}})
}

func (r *run) ended(e *posternv1.NotebookEnded) {
	r.emit(&posternv1.NotebookEvent{Event: &posternv1.NotebookEvent_Ended{Ended: e}})
}

// check holds cells against the bounds.
func check(cells []*posternv1.NotebookCell) error {
	if len(cells) > maxCells {
		return proto.Errorf(proto.CodeInvalid, "the notebook has %d code cells, more than %d", len(cells), maxCells)
	}
	for i, c := range cells {
		if len(c.GetId()) > maxID {
			return proto.Errorf(proto.CodeInvalid, "the id of cell %d has more than %d bytes", i, maxID)
		}
	}
	return nil
}

func document(spec string, cells []*posternv1.NotebookCell) *notebook.Document {
	sources := make([]string, len(cells))
	for i, c := range cells {
		sources[i] = c.GetSource()
	}
	return notebook.Of(spec, sources)
}

// filled are the indexes of the cells that have something to run.
func filled(cells []*posternv1.NotebookCell) []int {
	var indexes []int
	for i, c := range cells {
		if strings.Trim(c.GetSource(), " \t\r\n") != "" {
			indexes = append(indexes, i)
		}
	}
	return indexes
}

// top is how many cells of the request, from the top, the first n that have something to
// run are, with blank ones behind them.
func top(cells []*posternv1.NotebookCell, n int) uint32 {
	indexes := filled(cells)
	switch {
	case n == 0:
		return 0
	case n >= len(indexes):
		return uint32(len(cells))
	}
	return uint32(indexes[n])
}

// finished is a cell that ran, before its results are there.
type finished struct {
	index  int
	took   time.Duration
	failed error
}

// watch makes events of what a kernel, and what runs notebooks on it, say.
func (r *run) watch(k *kernel) notebook.Options {
	running := -1
	var last finished
	k.note = r.note
	k.saw = func(m *posternv1.KernelMessage) {
		p, ok := notebook.PieceOf(m)
		if !ok || running < 0 {
			return
		}
		r.offer(&posternv1.NotebookEvent{Event: &posternv1.NotebookEvent_Output{Output: &posternv1.NotebookOutput{
			Index: uint32(running), Output: string(p.Output), Clear: p.Clear, ClearWithNext: p.ClearWithNext, DisplayId: strings.ToValidUTF8(p.Display, "\uFFFD"), Update: p.Update,
		}}})
	}
	return notebook.Options{
		MaxOutput: maxOutput, Forget: true,
		Changed: func(_ int, result notebook.Result) { r.finish(last, result) },
		Progress: notebook.Progress{
			Cell: func(cell, _ int, took time.Duration, failed error) {
				if took == 0 {
					running = cell - 1
					r.emit(&posternv1.NotebookEvent{Event: &posternv1.NotebookEvent_CellStarted{CellStarted: &posternv1.NotebookCellStarted{Index: uint32(running), Id: r.cells[running].GetId()}}})
					return
				}
				running, last = -1, finished{cell - 1, took, failed}
			},
			Checkpoint: func(cell int, id string, took time.Duration) {
				r.emit(&posternv1.NotebookEvent{Event: &posternv1.NotebookEvent_Checkpointed{Checkpointed: &posternv1.NotebookCheckpointed{
					Cells: top(r.cells, cell), CheckpointId: id, Duration: durationpb.New(took),
				}}})
			},
			Rollback: func(cell int, id string, took time.Duration) {
				r.emit(&posternv1.NotebookEvent{Event: &posternv1.NotebookEvent_RolledBackTo{RolledBackTo: &posternv1.NotebookRolledBack{
					Cells: top(r.cells, cell), CheckpointId: id, Duration: durationpb.New(took),
				}}})
			},
			Note: r.note,
		},
	}
}

// finish tells how a cell ended. One that was taken away while it ran has no end.
func (r *run) finish(f finished, result notebook.Result) {
	outputs := "[]"
	if len(result.Outputs) > 0 {
		text, err := json.Marshal(result.Outputs)
		if err != nil {
			r.note("the outputs of a cell can't be told: " + err.Error())
		} else {
			outputs = string(text)
		}
	}
	id, count := r.cells[f.index].GetId(), uint32(max(result.Count, 0))
	var failed *notebook.CellError
	switch {
	case errors.As(f.failed, &failed):
		r.failed(failed, id, count, outputs, f.took)
	case f.failed == nil:
		r.emit(&posternv1.NotebookEvent{Event: &posternv1.NotebookEvent_CellDone{CellDone: &posternv1.NotebookCellDone{
			Index: uint32(f.index), Id: id, ExecutionCount: count, Outputs: outputs, Duration: durationpb.New(f.took),
		}}})
	}
}

func (r *run) failed(e *notebook.CellError, id string, count uint32, outputs string, took time.Duration) {
	r.emit(&posternv1.NotebookEvent{Event: &posternv1.NotebookEvent_Failed{Failed: &posternv1.NotebookFailed{
		Index: uint32(e.Index), Id: id, ExecutionCount: count, Outputs: outputs, Duration: durationpb.New(took),
		ErrorClass: clip(e.Class, 256), ErrorText: clip(e.Value, 8<<10),
	}}})
}

// clip bounds a text in bytes and makes it UTF-8.
func clip(text string, most int) string {
	if len(text) > most {
		text = text[:most]
	}
	return strings.ToValidUTF8(text, "")
}

// Run runs cells once, in a kernel of its own.
func (s *Service) Run(ctx context.Context, c Caller, m *posternv1.RunNotebookRequest, send func(*posternv1.NotebookEvent) error) error {
	limit, err := timeout(m.CellTimeout)
	if err != nil {
		return err
	}
	return s.start(ctx, c, m.Cells, send, func(r *run) error {
		started, err := s.cfg.Kernels.Start(r.ctx, c, m.Agent, m.Spec, m.Mounts)
		if err != nil {
			return err
		}
		k := s.kernel(c, started)
		k.plain = true
		o := r.watch(k)
		defer k.stop(r.ctx)
		o.AllowErrors, o.Timeout = m.AllowErrors, limit
		d := document(started.Kernel.GetSpec(), m.Cells)
		r.began(started, 0, len(filled(m.Cells)))
		_, err = notebook.Run(r.ctx, k, d, o)
		var failed *notebook.CellError
		if err != nil && !errors.As(err, &failed) {
			return err
		}
		r.ended(&posternv1.NotebookEnded{Ok: err == nil})
		return nil
	})
}

func (r *run) began(k *posternv1.AgentKernel, keep, run int) {
	r.emit(&posternv1.NotebookEvent{Event: &posternv1.NotebookEvent_Began{Began: &posternv1.NotebookBegan{
		KernelId: k.Kernel.GetId(), Agent: k.Agent, Spec: k.Kernel.GetSpec(), Keep: top(r.cells, keep), Run: uint32(run),
	}}})
}

func timeout(d *durationpb.Duration) (time.Duration, error) {
	if d == nil {
		return 0, nil
	}
	if !d.IsValid() || d.AsDuration() < 0 {
		return 0, proto.Errorf(proto.CodeInvalid, "the cells' timeout is out of range")
	}
	return d.AsDuration(), nil
}
