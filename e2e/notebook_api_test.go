package e2e

import (
	"context"
	"fmt"
	"strings"
	gosync "sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/e2e/stack"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// told is what a call of the notebook API told.
type told struct {
	kernel  string
	events  []string
	outputs map[uint32]string // by cell, of those that ran
	err     error
}

func (o told) String() string { return strings.Join(o.events, " ") }

// notebookAPI is an editor's way to run cells.
type notebookAPI struct {
	t *testing.T
	c *client.Client
}

func (n notebookAPI) sync(ctx context.Context, kernel string, each func(*posternv1.NotebookEvent), sources ...string) told {
	n.t.Helper()
	m := &posternv1.SyncNotebookRequest{KernelId: kernel}
	if kernel == "" {
		m.Agent = "host"
	}
	for i, s := range sources {
		m.Cells = append(m.Cells, &posternv1.NotebookCell{Id: fmt.Sprint(i), Source: s})
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	out := told{kernel: kernel, outputs: map[uint32]string{}}
	stream, err := n.c.Notebooks.SyncNotebook(ctx, connect.NewRequest(m))
	if err != nil {
		out.err = err
		return out
	}
	defer stream.Close() //nolint:errcheck // read to its end
	say := func(format string, args ...any) { out.events = append(out.events, fmt.Sprintf(format, args...)) }
	for stream.Receive() {
		if each != nil {
			each(stream.Msg())
		}
		switch e := stream.Msg().Event.(type) {
		case *posternv1.NotebookEvent_Began:
			out.kernel = e.Began.KernelId
			say("began(%d,%d)", e.Began.Keep, e.Began.Run)
		case *posternv1.NotebookEvent_RolledBackTo:
			say("back(%d)", e.RolledBackTo.Cells)
		case *posternv1.NotebookEvent_CellStarted:
			say("start(%d)", e.CellStarted.Index)
		case *posternv1.NotebookEvent_CellDone:
			out.outputs[e.CellDone.Index] = e.CellDone.Outputs
			say("done(%d)", e.CellDone.Index)
		case *posternv1.NotebookEvent_Checkpointed:
			say("kept(%d)", e.Checkpointed.Cells)
		case *posternv1.NotebookEvent_Failed:
			out.outputs[e.Failed.Index] = e.Failed.Outputs
			say("failed(%d,%s)", e.Failed.Index, e.Failed.ErrorClass)
		case *posternv1.NotebookEvent_Ended:
			say("ended(%t,%t)", e.Ended.Ok, e.Ended.Superseded)
		}
	}
	if err := stream.Err(); err != nil {
		out.err = proto.FromConnect(err)
	}
	return out
}

// TestNotebookAPI edits a notebook through the API, while nothing happens, while a cell
// runs, and after agentd and the control plane were killed.
func TestNotebookAPI(t *testing.T) {
	s, a := withKernelsOf(t, stack.Options{Bin: checkpointBinaries(t)})
	n := notebookAPI{t, api(t, s)}
	kernel := ""
	sync := func(events string, outputs map[uint32]string, sources ...string) {
		t.Helper()
		got := n.sync(t.Context(), kernel, nil, sources...)
		if got.err != nil || got.String() != events {
			t.Fatalf("%q:\ngot  %s, %v\nwant %s", sources, got, got.err, events)
		}
		for i, want := range outputs {
			if !strings.Contains(got.outputs[i], want) {
				t.Errorf("cell %d of %q has %s, want %s", i, sources, got.outputs[i], want)
			}
		}
		kernel = got.kernel
	}
	first := "items = ['a']; print(items)"
	sync("began(0,2) start(0) done(0) kept(1) start(1) done(1) kept(2) ended(true,false)", map[uint32]string{0: "['a']", 1: "['a', 'b']"}, first, "items.append('b'); print(items)")
	sync("began(2,1) start(2) done(2) kept(3) ended(true,false)", map[uint32]string{2: "'b', 'c'"}, first, "items.append('b'); print(items)", "items.append('c'); print(items)")
	sync("began(1,2) back(1) start(1) done(1) kept(2) start(2) failed(2,ZeroDivisionError) ended(false,false)", map[uint32]string{1: "['a', 'x']", 2: `"ename":"ZeroDivisionError"`}, first, "items.append('x'); print(items)", "1/0")

	// An edit while a cell runs.
	running := make(chan struct{})
	seen := gosync.OnceFunc(func() { close(running) }) // the traceback has it again
	older := make(chan told, 1)
	go func() {
		older <- n.sync(t.Context(), kernel, func(e *posternv1.NotebookEvent) {
			if strings.Contains(e.GetOutput().GetOutput(), "sleeps") {
				seen()
			}
		}, first, "items.append('x'); print(items)", "print('sleeps', flush=True)\nimport time; time.sleep(600)")
	}()
	<-running
	sync("began(2,1) back(2) start(2) done(2) kept(3) ended(true,false)", map[uint32]string{2: "['a', 'x', 'y']"}, first, "items.append('x'); print(items)", "items.append('y'); print(items)")
	if o := <-older; o.err != nil || o.String() != "began(2,1) back(2) start(2) ended(false,true)" {
		t.Errorf("the older call was told %s, %v", o, o.err)
	}

	// The tunnel's other end dies in the midst of a cell, which goes on.
	through := make(chan told, 1)
	restart := make(chan struct{})
	waits := gosync.OnceFunc(func() { close(restart) })
	go func() {
		through <- n.sync(t.Context(), kernel, func(e *posternv1.NotebookEvent) {
			if strings.Contains(e.GetOutput().GetOutput(), "waits") {
				waits()
			}
		}, first, "print('waits', flush=True)\nimport time; time.sleep(3); items.append('z'); print(items)")
	}()
	<-restart
	a.Process.Kill()
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	o := <-through
	if o.err != nil || !strings.Contains(o.outputs[1], "['a', 'z']") {
		t.Errorf("a cell during which agentd was killed: %s, %v; outputs %v", o, o.err, o.outputs)
	}

	// The next day: the control plane knows nothing, the kernel is on its host's disk.
	if err := a.Online(t.Context()); err != nil {
		t.Fatal(err)
	}
	must(t, s, "kernel", "suspend", kernel)
	s.ControlPlane.Kill()
	a.Process.Kill()
	if err := s.StartControlPlane(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	if err := a.Online(t.Context()); err != nil {
		t.Fatal(err)
	}
	sync("began(1,1) back(1) start(1) done(1) kept(2) ended(true,false)", map[uint32]string{1: "['a', 'next day']"}, first, "items.append('next day'); print(items)")
	sync("began(2,0) ended(true,false)", nil, first, "items.append('next day'); print(items)")

	history, err := n.c.Notebooks.NotebookHistory(t.Context(), connect.NewRequest(&posternv1.NotebookHistoryRequest{
		KernelId: kernel, Cells: []*posternv1.NotebookCell{{Source: first}, {Source: "items.append('next day'); print(items)"}},
	}))
	if err != nil {
		t.Fatal(err)
	}
	found, current := map[uint32]bool{}, ""
	for _, state := range history.Msg.States {
		if state.Cells != nil {
			found[*state.Cells] = true
		}
		if state.Current && state.Cells != nil {
			current += fmt.Sprint(*state.Cells)
		}
	}
	if !found[0] || !found[1] || !found[2] || current != "2" {
		t.Errorf("the history is %v", history.Msg)
	}
	if text := must(t, s, "audit", "list", "--limit", "200"); !strings.Contains(text, "kernel.execute") {
		t.Errorf("no code of cells in the audit chain:\n%s", text)
	}

	// Once, in a kernel of its own.
	stream, err := n.c.Notebooks.RunNotebook(t.Context(), connect.NewRequest(&posternv1.RunNotebookRequest{Agent: "host", Cells: []*posternv1.NotebookCell{{Source: "6 * 7"}}}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close() //nolint:errcheck // read to its end
	outputs, ok := "", false
	for stream.Receive() {
		if d := stream.Msg().GetCellDone(); d != nil {
			outputs = d.Outputs
		}
		ok = ok || stream.Msg().GetEnded().GetOk()
	}
	if stream.Err() != nil || !ok || !strings.Contains(outputs, `"42"`) {
		t.Errorf("a run: %v, %s, %v", ok, outputs, stream.Err())
	}
	if left := mustJSON[[]any](t, s, "kernel", "list"); len(left) != 1 {
		t.Errorf("%d kernels are there, want 1", len(left))
	}
}
