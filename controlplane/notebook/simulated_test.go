package notebook

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// simulated is an agent with kernels that have one variable, a text: a cell "add X"
// appends X to it and prints it, "fail X" fails, "wait" waits to be interrupted, "big"
// prints a lot.
type simulated struct {
	mu      sync.Mutex
	kernels map[string]*simulatedKernel
	waiting chan struct{} // gets one when a cell waits
	refuse  error         // what checkpoints answer
	audited []string
	clock   int64
	streams sync.WaitGroup
}

type simulatedKernel struct {
	host  *simulated
	id    string
	state posternv1.KernelState
	text  string
	at    string // the checkpoint that it descends from
	// What the host tells: the checkpoint that its processes came of, and when.
	from       string
	generation uint64
	started    int64
	made       int
	count      int
	ran        []string
	stopped    bool // it drops the next cell, for one that failed said to stop on errors
	kept       []*posternv1.KernelCheckpoint
	texts      map[string]string
	interrupt  chan struct{}

	journal []*posternv1.KernelMessage
	seen    map[string]bool
	conn    net.Conn // of the newest stream
	changed chan struct{}
	running sync.WaitGroup
}

func newSimulated(t *testing.T) *simulated {
	h := &simulated{kernels: map[string]*simulatedKernel{}, waiting: make(chan struct{}, 16)}
	t.Cleanup(func() {
		h.drop()
		h.streams.Wait()
		for _, k := range h.kernels {
			k.running.Wait()
		}
	})
	return h
}

// drop breaks all streams.
func (h *simulated) drop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, k := range h.kernels {
		if k.conn != nil {
			_ = k.conn.Close()
		}
	}
}

func (h *simulated) kernel(id string) (*simulatedKernel, error) {
	if k := h.kernels[id]; k != nil {
		return k, nil
	}
	return nil, proto.Errorf(proto.CodeNotFound, "no kernel %s", id)
}

func (k *simulatedKernel) describe() *posternv1.AgentKernel {
	return &posternv1.AgentKernel{Agent: "edge", Online: true, Kernel: &posternv1.Kernel{
		Id: k.id, Spec: "python3", State: k.state, Checkpoint: k.from, Generation: k.generation, Started: timestamppb.New(time.Unix(k.started, 0)), Owner: &posternv1.Principal{TokenId: "tok_1", TokenName: "ana"},
	}}
}

func (h *simulated) Start(_ context.Context, _ Caller, agent, spec string, _ []*posternv1.KernelMount) (*posternv1.AgentKernel, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if agent != "edge" {
		return nil, proto.Errorf(proto.CodeNotFound, "no agent %s", agent)
	}
	k := &simulatedKernel{
		host: h, id: fmt.Sprintf("k%d", len(h.kernels)+1), state: posternv1.KernelState_KERNEL_STATE_IDLE,
		texts: map[string]string{}, interrupt: make(chan struct{}, 1), seen: map[string]bool{}, changed: make(chan struct{}),
	}
	h.kernels[k.id] = k
	return k.describe(), nil
}

func (h *simulated) Get(_ context.Context, _ Caller, id string) (*posternv1.AgentKernel, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	k, err := h.kernel(id)
	if err != nil {
		return nil, err
	}
	return k.describe(), nil
}

func (h *simulated) Interrupt(_ context.Context, _ Caller, id string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	k, err := h.kernel(id)
	if err == nil {
		select {
		case k.interrupt <- struct{}{}:
		default:
		}
	}
	return err
}

func (h *simulated) Restart(_ context.Context, _ Caller, id string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	k, err := h.kernel(id)
	if err == nil {
		h.clock++
		k.generation, k.started, k.from = k.generation+1, h.clock, ""
		k.text, k.count, k.at, k.state = "", 0, "", posternv1.KernelState_KERNEL_STATE_IDLE
		k.ran = append(k.ran, "(restart)")
	}
	return err
}

func (h *simulated) Stop(_ context.Context, _ Caller, id string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	k, err := h.kernel(id)
	if err == nil {
		k.state = posternv1.KernelState_KERNEL_STATE_DEAD
	}
	return err
}

func (h *simulated) CheckpointKernel(_ context.Context, _ Caller, r *posternv1.CheckpointKernelRequest) (*posternv1.CheckpointKernelResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	k, err := h.kernel(r.KernelId)
	if err == nil {
		err = h.refuse
	}
	if err != nil {
		return nil, err
	}
	k.made++
	p := &posternv1.KernelCheckpoint{Id: fmt.Sprintf("c%d", k.made), Parent: k.at, Label: r.Label}
	h.clock++
	p.Time = timestamppb.New(time.Unix(h.clock, 0))
	k.kept, k.at = append(k.kept, p), p.Id
	k.texts[p.Id] = k.text
	return &posternv1.CheckpointKernelResponse{Checkpoint: p}, nil
}

func (h *simulated) RollbackKernel(_ context.Context, _ Caller, r *posternv1.KernelCheckpointRequest) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	k, err := h.kernel(r.KernelId)
	if err != nil {
		return err
	}
	for _, p := range k.kept {
		if p.Id == r.CheckpointId {
			h.clock++
			k.text, k.at, k.from = k.texts[p.Id], p.Id, p.Id
			k.generation, k.started = k.generation+1, h.clock
			return nil
		}
	}
	return proto.Errorf(proto.CodeNotFound, "no checkpoint %s", r.CheckpointId)
}

func (h *simulated) ResumeKernel(_ context.Context, _ Caller, r *posternv1.KernelCheckpointRequest) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	k, err := h.kernel(r.KernelId)
	if err == nil {
		k.state = posternv1.KernelState_KERNEL_STATE_IDLE
	}
	return err
}

func (h *simulated) ListCheckpoints(_ context.Context, _ Caller, r *posternv1.KernelCheckpointRequest) (*posternv1.ListCheckpointsResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	k, err := h.kernel(r.KernelId)
	if err != nil {
		return nil, err
	}
	return &posternv1.ListCheckpointsResponse{Checkpoints: append([]*posternv1.KernelCheckpoint(nil), k.kept...)}, nil
}

// channels are one stream's.
type channels struct {
	net.Conn
	host *simulated
}

func (channels) Retired() <-chan struct{} { return nil }

func (c channels) Record(_ context.Context, _ jupyter.Header, m *posternv1.KernelMessage) error {
	c.host.mu.Lock()
	defer c.host.mu.Unlock()
	c.host.audited = append(c.host.audited, string(m.Content))
	return nil
}

func (h *simulated) Attach(_ context.Context, _ Caller, a Attach) (Channels, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	k, err := h.kernel(a.Kernel)
	if err != nil {
		return nil, err
	}
	mine, theirs := net.Pipe()
	if k.conn != nil {
		_ = k.conn.Close()
	}
	k.conn = theirs
	from := len(k.journal)
	if a.Resume {
		from = int(a.After)
	}
	out := kernelstream.NewWriter(theirs)
	gone := make(chan struct{})
	h.streams.Go(func() { // deliveries
		defer theirs.Close()
		for {
			h.mu.Lock()
			rest, changed := k.journal[from:], k.changed
			h.mu.Unlock()
			for _, m := range rest {
				from++
				if out.Send(&posternv1.KernelFrame{Frame: &posternv1.KernelFrame_Delivery{Delivery: &posternv1.KernelDelivery{Sequence: uint64(from), Message: m}}}) != nil {
					return
				}
			}
			select {
			case <-changed:
			case <-gone:
				return
			}
		}
	})
	h.streams.Go(func() { // requests
		defer close(gone)
		in := kernelstream.NewReader(theirs)
		for {
			f, err := in.Next()
			if err != nil {
				return
			}
			if m := f.GetSend(); m != nil {
				head, _ := jupyter.ParseHeader(m.Header)
				h.mu.Lock()
				again := k.seen[head.ID]
				k.seen[head.ID] = true
				h.mu.Unlock()
				if !again {
					k.running.Go(func() { k.run(m) })
				}
			}
		}
	})
	return channels{mine, h}, nil
}

// say appends a message that answers a request.
func (k *simulatedKernel) say(channel, kind string, request *posternv1.KernelMessage, content any) {
	m, err := jupyter.New(channel, kind, "kernel", content)
	if err != nil {
		panic(err)
	}
	m.ParentHeader = request.Header
	k.host.mu.Lock()
	defer k.host.mu.Unlock()
	k.journal = append(k.journal, m)
	close(k.changed)
	k.changed = make(chan struct{})
}

func (k *simulatedKernel) run(request *posternv1.KernelMessage) {
	var c struct {
		Code        string `json:"code"`
		Silent      bool   `json:"silent"`
		StopOnError *bool  `json:"stop_on_error"` // true where it is missing
	}
	if err := json.Unmarshal(request.Content, &c); err != nil {
		panic(err)
	}
	reply := map[string]any{"status": "ok"}
	// What comes right after an error is dropped if that was asked for, as ipykernel does in the moment after it.
	k.host.mu.Lock()
	aborted := k.stopped && !c.Silent
	if !c.Silent {
		k.stopped = false
	}
	k.host.mu.Unlock()
	if aborted {
		reply = map[string]any{"status": "aborted"}
	}
	if !c.Silent && !aborted {
		k.host.mu.Lock()
		k.count++
		k.ran = append(k.ran, c.Code)
		count := k.count
		k.host.mu.Unlock()
		reply["execution_count"] = count
		k.say("iopub", "execute_input", request, map[string]any{"execution_count": count, "code": c.Code})
		word, rest, _ := strings.Cut(c.Code, " ")
		switch word {
		case "add":
			k.host.mu.Lock()
			k.text += rest
			text := k.text
			k.host.mu.Unlock()
			k.say("iopub", "stream", request, map[string]any{"name": "stdout", "text": text + "\n"})
		case "fail":
			k.say("iopub", "error", request, map[string]any{"ename": "Oops", "evalue": rest, "traceback": []string{"t"}})
			reply = map[string]any{"status": "error", "ename": "Oops", "evalue": rest, "execution_count": count}
			k.host.mu.Lock()
			k.stopped = c.StopOnError == nil || *c.StopOnError
			k.host.mu.Unlock()
		case "big":
			for range 600 {
				k.say("iopub", "stream", request, map[string]any{"name": "stdout", "text": strings.Repeat("x", 10_000)})
			}
		case "wait":
			k.host.mu.Lock()
			k.text += "half"
			k.host.mu.Unlock()
			k.host.waiting <- struct{}{}
			<-k.interrupt
			reply = map[string]any{"status": "error", "ename": "KeyboardInterrupt", "evalue": ""}
		}
	}
	k.say("shell", "execute_reply", request, reply)
	k.say("iopub", "status", request, map[string]any{"execution_state": "idle"})
}
