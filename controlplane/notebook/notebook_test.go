package notebook

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

var ana = Caller{Principal: &posternv1.Principal{Organization: "org", TokenId: "tok_1", TokenName: "ana", Role: "analyst"}}

func cells(sources ...string) []*posternv1.NotebookCell {
	var out []*posternv1.NotebookCell
	for i, s := range sources {
		out = append(out, &posternv1.NotebookCell{Id: fmt.Sprint("id", i), Source: s})
	}
	return out
}

// short is an event in a few characters.
func short(e *posternv1.NotebookEvent) string {
	switch e := e.Event.(type) {
	case *posternv1.NotebookEvent_Began:
		return fmt.Sprintf("began(%d,%d)", e.Began.Keep, e.Began.Run)
	case *posternv1.NotebookEvent_RolledBackTo:
		return fmt.Sprintf("back(%d,%s)", e.RolledBackTo.Cells, e.RolledBackTo.CheckpointId)
	case *posternv1.NotebookEvent_CellStarted:
		return fmt.Sprintf("start(%d)", e.CellStarted.Index)
	case *posternv1.NotebookEvent_Output:
		return "" // may be left out
	case *posternv1.NotebookEvent_CellDone:
		text := ""
		if _, rest, ok := strings.Cut(e.CellDone.Outputs, `"text":["`); ok {
			text, _, _ = strings.Cut(rest, `\n`)
		}
		return fmt.Sprintf("done(%d,%s)", e.CellDone.Index, text)
	case *posternv1.NotebookEvent_Checkpointed:
		return fmt.Sprintf("kept(%d,%s)", e.Checkpointed.Cells, e.Checkpointed.CheckpointId)
	case *posternv1.NotebookEvent_Failed:
		return fmt.Sprintf("failed(%d,%s)", e.Failed.Index, e.Failed.ErrorClass)
	case *posternv1.NotebookEvent_Ended:
		return fmt.Sprintf("ended(%t,%t)", e.Ended.Ok, e.Ended.Superseded)
	case *posternv1.NotebookEvent_Note:
		return "note"
	}
	return "?"
}

type log struct{ all []*posternv1.NotebookEvent }

func (l *log) take(e *posternv1.NotebookEvent) error {
	l.all = append(l.all, e)
	return nil
}

func (l *log) String() string {
	var words []string
	for _, e := range l.all {
		if s := short(e); s != "" {
			words = append(words, s)
		}
	}
	return strings.Join(words, " ")
}

func syncCells(t *testing.T, s *Service, id string, sources ...string) (string, error) {
	t.Helper()
	m := &posternv1.SyncNotebookRequest{KernelId: id, Cells: cells(sources...)}
	if id == "" {
		m.Agent = "edge"
	}
	var l log
	err := s.Sync(t.Context(), ana, m, l.take)
	return l.String(), err
}

func TestSyncFollowsEdits(t *testing.T) {
	h := newSimulated(t)
	s := New(Config{Kernels: h})
	want := func(s *Service, id, events string, sources ...string) {
		t.Helper()
		if got, err := syncCells(t, s, id, sources...); got != events || err != nil {
			t.Errorf("%q:\ngot  %s, %v\nwant %s", sources, got, err, events)
		}
	}
	want(s, "", "began(0,3) start(0) done(0,a) kept(2,c2) start(2) done(2,ab) kept(3,c3) start(3) done(3,abc) kept(4,c4) ended(true,false)", "add a", "  \n", "add b", "add c")
	want(s, "k1", "began(4,0) ended(true,false)", "add a", "", "add b", "add c")
	want(s, "k1", "began(1,1) back(1,c2) start(1) done(1,ax) kept(2,c5) ended(true,false)", "add a", "add x")
	want(s, "k1", "began(2,1) start(2) done(2,axy) kept(3,c6) ended(true,false)", "add a", "add x", "add y")
	// A cell that fails, as it stands, and changed.
	want(s, "k1", "began(2,2) back(2,c5) start(2) failed(2,Oops) ended(false,false)", "add a", "add x", "fail no", "add z")
	want(s, "k1", "began(3,2) failed(3,Oops) ended(false,false)", "add a", "add x", "", "fail no", "add z")
	want(s, "k1", "began(2,1) back(2,c5) start(2) done(2,axz) kept(3,c7) ended(true,false)", "add a", "add x", "add z")
	// A control plane that knows nothing of it goes on from the labels, after one rollback.
	s = New(Config{Kernels: h})
	want(s, "k1", "began(3,1) back(3,c7) start(3) done(3,axzq) kept(4,c8) ended(true,false)", "add a", "add x", "add z", "add q")
	want(New(Config{Kernels: h}), "k1", "began(1,1) back(1,c2) start(1) done(1,ap) kept(2,c9) ended(true,false)", "add a", "add p")
	// Somebody else took the kernel elsewhere.
	if err := h.RollbackKernel(t.Context(), ana, &posternv1.KernelCheckpointRequest{KernelId: "k1", CheckpointId: "c1"}); err != nil {
		t.Fatal(err)
	}
	want(s, "k1", "began(4,0) back(4,c8) ended(true,false)", "add a", "add x", "add z", "add q")
	// It was suspended.
	h.kernels["k1"].state = posternv1.KernelState_KERNEL_STATE_SUSPENDED
	want(s, "k1", "note began(4,1) back(4,c8) start(4) done(4,axzqn) kept(5,c10) ended(true,false)", "add a", "add x", "add z", "add q", "add n")
	// The host's limits took checkpoints away that are known here.
	h.kernels["k1"].kept = h.kernels["k1"].kept[:2]
	want(s, "k1", "began(4,1) back(1,c2) start(1) done(1,ax) kept(2,c11) start(2) done(2,axz) kept(3,c12) start(3) done(3,axzq) kept(4,c13) start(4) done(4,axzqm) kept(5,c14) ended(true,false)", "add a", "add x", "add z", "add q", "add m")
	// It was moved to another host: the checkpoints stayed, but for the one that it came of.
	k1 := h.kernels["k1"]
	moved := &posternv1.KernelCheckpoint{Id: "m1", Parent: k1.at, Kind: "suspend", Time: timestamppb.Now()}
	k1.kept, k1.at, k1.from, k1.texts["m1"] = []*posternv1.KernelCheckpoint{moved}, "m1", "m1", k1.text
	k1.generation++
	want(s, "k1", "began(5,1) back(5,m1) start(5) done(5,axzqmo) kept(6,c15) ended(true,false)", "add a", "add x", "add z", "add q", "add m", "add o")
	if h.kernels["k1"].text != "axzqmo" {
		t.Errorf("the kernel has %q", h.kernels["k1"].text)
	}
	if len(h.audited) < 10 || strings.Contains(strings.Join(h.audited, ""), `"code":""`) {
		t.Errorf("audited: %q", h.audited)
	}
}

func TestSyncWithoutCheckpoints(t *testing.T) {
	h := newSimulated(t)
	s := New(Config{Kernels: h})
	h.refuse = proto.Errorf(proto.CodeUnavailable, "no CRIU here")
	if got, err := syncCells(t, s, "", "add a"); err == nil || !strings.Contains(err.Error(), "no CRIU") || got != "began(0,1)" {
		t.Errorf("got %s, %v", got, err)
	}
	if h.kernels["k1"].state != posternv1.KernelState_KERNEL_STATE_DEAD {
		t.Error("the kernel of a run that did not begin goes on")
	}
	var l log
	for _, m := range []*posternv1.SyncNotebookRequest{
		{Agent: "edge", NoCheckpoints: true, Cells: cells("add a", "add b")},
		{KernelId: "k2", NoCheckpoints: true, Cells: cells("add a", "add b", "add c")},
		{KernelId: "k2", NoCheckpoints: true, Cells: cells("add a", "add x")},
	} {
		if err := s.Sync(t.Context(), ana, m, l.take); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := strings.Join(h.kernels["k2"].ran, ", "), "add a, add b, add c, (restart), add a, add x"; got != want {
		t.Errorf("ran %s, want %s", got, want)
	}
}

// TestSyncIsSuperseded sends an edit while a cell runs.
func TestSyncIsSuperseded(t *testing.T) {
	h := newSimulated(t)
	s := New(Config{Kernels: h})
	type outcome struct {
		events string
		err    error
	}
	first := make(chan outcome, 1)
	go func() {
		got, err := syncCells(t, s, "", "add a", "wait", "add c")
		first <- outcome{got, err}
	}()
	<-h.waiting
	got, err := syncCells(t, s, "k1", "add a", "add b")
	if want := "began(1,1) back(1,c2) start(1) done(1,ab) kept(2,c3) ended(true,false)"; got != want || err != nil {
		t.Errorf("got  %s, %v\nwant %s", got, err, want)
	}
	if o := <-first; o.err != nil || o.events != "began(0,3) start(0) done(0,a) kept(1,c2) start(1) ended(false,true)" {
		t.Errorf("the first: %s, %v", o.events, o.err)
	}
	if h.kernels["k1"].text != "ab" {
		t.Errorf("the kernel has %q", h.kernels["k1"].text)
	}
}

// TestStreamIsLost breaks the kernel's stream in the midst of a cell.
func TestStreamIsLost(t *testing.T) {
	h := newSimulated(t)
	s := New(Config{Kernels: h})
	done := make(chan struct{})
	go func() {
		defer close(done)
		got, err := syncCells(t, s, "", "add a", "wait", "add b")
		if want := "began(0,3) start(0) done(0,a) kept(1,c2) start(1) failed(1,KeyboardInterrupt) ended(false,false)"; got != want || err != nil {
			t.Errorf("got  %s, %v\nwant %s", got, err, want)
		}
	}()
	<-h.waiting
	h.drop()
	time.Sleep(10 * time.Millisecond)
	h.drop()
	if err := h.Interrupt(t.Context(), ana, "k1"); err != nil {
		t.Fatal(err)
	}
	<-done
	if ran := strings.Join(h.kernels["k1"].ran, ","); ran != "add a,wait" {
		t.Errorf("ran %s", ran)
	}
}

func TestRun(t *testing.T) {
	h := newSimulated(t)
	s := New(Config{Kernels: h})
	var l log
	if err := s.Run(t.Context(), ana, &posternv1.RunNotebookRequest{Agent: "edge", Cells: cells("add a", "", "fail no", "add b")}, l.take); err != nil {
		t.Fatal(err)
	}
	if got, want := l.String(), "began(0,3) start(0) done(0,a) start(2) failed(2,Oops) ended(false,false)"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if last := l.all[len(l.all)-2].GetFailed(); last.Id != "id2" || last.ErrorText != "no" || !strings.Contains(last.Outputs, `"ename":"Oops"`) || last.ExecutionCount != 2 {
		t.Errorf("the failure is %v", last)
	}
	if h.kernels["k1"].state != posternv1.KernelState_KERNEL_STATE_DEAD {
		t.Error("the kernel goes on")
	}
	l = log{}
	if err := s.Run(t.Context(), ana, &posternv1.RunNotebookRequest{Agent: "edge", AllowErrors: true, Cells: cells("fail no", "add b")}, l.take); err != nil {
		t.Fatal(err)
	}
	if got, want := l.String(), "began(0,2) start(0) failed(0,Oops) start(1) done(1,b) ended(false,false)"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	l = log{}
	if err := s.Run(t.Context(), ana, &posternv1.RunNotebookRequest{Agent: "edge", AllowErrors: true, Cells: cells("wait"), CellTimeout: durationpb.New(200 * time.Millisecond)}, l.take); err != nil {
		t.Fatal(err)
	}
	if got, want := l.String(), "began(0,1) start(0) failed(0,timeout) ended(false,false)"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// TestManyOutputs has a cell print more than is kept, for a caller that is slow.
func TestManyOutputs(t *testing.T) {
	h := newSimulated(t)
	s := New(Config{Kernels: h})
	pieces, size := 0, 0
	var done *posternv1.NotebookCellDone
	err := s.Run(t.Context(), ana, &posternv1.RunNotebookRequest{Agent: "edge", Cells: cells("big")}, func(e *posternv1.NotebookEvent) error {
		if o := e.GetOutput(); o != nil {
			time.Sleep(time.Millisecond)
			pieces, size = pieces+1, size+len(o.Output)
		}
		if d := e.GetCellDone(); d != nil {
			done = d
		}
		return nil
	})
	if err != nil || done == nil {
		t.Fatal(err)
	}
	if pieces == 0 || size > 7<<20 || len(done.Outputs) > maxOutput+1<<20 || !strings.Contains(done.Outputs, "are left out") {
		t.Errorf("%d pieces, %d bytes; at the end %d bytes", pieces, size, len(done.Outputs))
	}
}

func TestHowRunsEnd(t *testing.T) {
	h := newSimulated(t)
	s := New(Config{Kernels: h})
	begin := func(send func(*posternv1.NotebookEvent) error) chan error {
		ended := make(chan error, 1)
		go func() {
			ended <- s.Run(t.Context(), ana, &posternv1.RunNotebookRequest{Agent: "edge", Cells: cells("wait")}, send)
		}()
		<-h.waiting
		return ended
	}
	quiet := func(*posternv1.NotebookEvent) error { return nil }
	ended := begin(quiet)
	s.CutToken("tok_other")
	s.CutOrganization("other")
	s.CutToken("tok_1")
	if err := <-ended; proto.CodeOf(err) != proto.CodeUnauthenticated {
		t.Errorf("after its token was revoked: %v", err)
	}
	ended = begin(quiet)
	s.CutOrganization("org")
	if err := <-ended; proto.CodeOf(err) != proto.CodeOrganizationDisabled {
		t.Errorf("after its organization was disabled: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() {
		gone <- s.Run(ctx, ana, &posternv1.RunNotebookRequest{Agent: "edge", Cells: cells("wait")}, quiet)
	}()
	<-h.waiting
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Errorf("after the caller hung up: %v", err)
	}
	var all []chan error
	for range maxOfToken {
		all = append(all, begin(quiet))
	}
	if err := s.Run(t.Context(), ana, &posternv1.RunNotebookRequest{Agent: "edge", Cells: cells("add a")}, quiet); proto.CodeOf(err) != proto.CodeOverloaded {
		t.Errorf("one too many: %v", err)
	}
	s.Close()
	for _, ended := range all {
		if err := <-ended; proto.CodeOf(err) != proto.CodeUnavailable {
			t.Errorf("after Close: %v", err)
		}
	}
	if err := s.Run(t.Context(), ana, &posternv1.RunNotebookRequest{Agent: "edge"}, quiet); proto.CodeOf(err) != proto.CodeUnavailable {
		t.Errorf("a run after Close: %v", err)
	}
	for id, k := range h.kernels {
		if k.state != posternv1.KernelState_KERNEL_STATE_DEAD {
			t.Errorf("kernel %s goes on", id)
		}
	}
	if len(s.active) != 0 || len(s.tokens) != 0 {
		t.Errorf("left: %v, %v", s.active, s.tokens)
	}
}

func TestRefusals(t *testing.T) {
	h := newSimulated(t)
	s := New(Config{Kernels: h})
	if _, err := syncCells(t, s, "", "add a"); err != nil {
		t.Fatal(err)
	}
	ben := Caller{Principal: &posternv1.Principal{Organization: "org", TokenId: "tok_2", TokenName: "ben", Role: "admin"}}
	for _, c := range []struct {
		name   string
		caller Caller
		m      *posternv1.SyncNotebookRequest
		code   proto.Code
	}{
		{"nowhere", ana, &posternv1.SyncNotebookRequest{}, proto.CodeInvalid},
		{"both", ana, &posternv1.SyncNotebookRequest{KernelId: "k1", Agent: "edge"}, proto.CodeInvalid},
		{"no such kernel", ana, &posternv1.SyncNotebookRequest{KernelId: "k9"}, proto.CodeNotFound},
		{"no such agent", ana, &posternv1.SyncNotebookRequest{Agent: "x"}, proto.CodeNotFound},
		{"another's", ben, &posternv1.SyncNotebookRequest{KernelId: "k1"}, proto.CodeRoleDenied},
		{"too many cells", ana, &posternv1.SyncNotebookRequest{KernelId: "k1", Cells: make([]*posternv1.NotebookCell, maxCells+1)}, proto.CodeInvalid},
		{"a long id", ana, &posternv1.SyncNotebookRequest{KernelId: "k1", Cells: []*posternv1.NotebookCell{{Id: strings.Repeat("x", 65)}}}, proto.CodeInvalid},
		{"a timeout", ana, &posternv1.SyncNotebookRequest{KernelId: "k1", CellTimeout: durationpb.New(-1)}, proto.CodeInvalid},
	} {
		if err := s.Sync(t.Context(), c.caller, c.m, func(*posternv1.NotebookEvent) error { return nil }); proto.CodeOf(err) != c.code {
			t.Errorf("%s: got %v", c.name, err)
		}
	}
}

func TestHistory(t *testing.T) {
	h := newSimulated(t)
	s := New(Config{Kernels: h})
	for _, sources := range [][]string{{"add a", "add b"}, {"add a", "add c"}} {
		id := ""
		if len(h.kernels) > 0 {
			id = "k1"
		}
		if _, err := syncCells(t, s, id, sources...); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.History(t.Context(), ana, &posternv1.NotebookHistoryRequest{KernelId: "k1", Cells: cells("", "add a", "add c", "add d")})
	if err != nil {
		t.Fatal(err)
	}
	text := ""
	for _, state := range got.States {
		cells := "-"
		if state.Cells != nil {
			cells = fmt.Sprint(*state.Cells)
		}
		text += fmt.Sprintf("%s:%d:%s:%t ", state.Checkpoint.Id, state.Depth, cells, state.Current)
	}
	if want := "c1:0:0:false c2:0:2:false c3:1:-:false c4:1:3:true "; text != want {
		t.Errorf("got %s, want %s", text, want)
	}
}
