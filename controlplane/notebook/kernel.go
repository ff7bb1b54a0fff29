package notebook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	"github.com/postern-dev/postern/proto/notebook"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// settleTime is how long an interrupted cell may take to end.
	settleTime = 30 * time.Second
	// interruptTime bounds the interrupt's own request.
	interruptTime = 15 * time.Second
	// awayTime is how long the agent may be away in the midst of a cell.
	awayTime = 5 * time.Minute
	// attachFirst and attachMost are between two attempts to reach it.
	attachFirst, attachMost = 50 * time.Millisecond, time.Second
	// checkpointWait is how long what another client runs may go on before a checkpoint.
	checkpointWait = 10 * time.Second
	// label begins the labels of checkpoints; the state follows, see notebook.State.
	label = "notebook "
)

// kernel is a kernel that runs cells, of one run.
type kernel struct {
	kernels Kernels
	caller  Caller
	id      string
	client  string
	plain   bool // no checkpoints
	// saw is told of each message of the cell that runs.
	saw func(*posternv1.KernelMessage)
	// note is told what a person may want to know.
	note func(string)

	stream *stream // nil: none is open
	after  uint64  // the newest delivery that was read
}

var (
	_ notebook.Kernel       = (*kernel)(nil)
	_ notebook.Checkpointer = (*kernel)(nil)
)

// stream is an open stream.
type stream struct {
	Channels
	in  *kernelstream.Reader
	out *kernelstream.Writer
	// release ends the watching of Retired.
	release func()
	close   sync.Once
}

// Close may be called at any time, from anywhere.
func (s *stream) Close() (err error) {
	s.close.Do(func() {
		s.release()
		err = s.Channels.Close()
	})
	return err
}

// attach opens the kernel's channels; again: after another stream was lost.
func (k *kernel) attach(ctx context.Context, again bool) error {
	channels, err := k.kernels.Attach(ctx, k.caller, Attach{Kernel: k.id, Client: k.client, Resume: again, After: k.after, Again: again})
	if err != nil {
		return err
	}
	watching, release := context.WithCancel(context.Background())
	s := &stream{Channels: channels, in: kernelstream.NewReader(channels), out: kernelstream.NewWriter(channels), release: release}
	go func() {
		select {
		case <-channels.Retired():
			_ = s.Close() // the next one comes by another tunnel
		case <-watching.Done():
		}
	}()
	k.stream = s
	return nil
}

// leave closes the kernel's channels.
func (k *kernel) leave() {
	if k.stream != nil {
		_ = k.stream.Close()
		k.stream = nil
	}
}

// ready waits until the kernel answers: it can't be saved before.
func (k *kernel) ready(ctx context.Context) error {
	_, err := k.execute(ctx, "", true, func(*posternv1.KernelMessage) {})
	return err
}

// Execute implements notebook.Kernel.
func (k *kernel) Execute(ctx context.Context, code string, take func(*posternv1.KernelMessage)) (notebook.Reply, error) {
	return k.execute(ctx, code, false, take)
}

// execute runs code until the kernel is idle again. When ctx ends the cell is
// interrupted and waited for.
func (k *kernel) execute(ctx context.Context, code string, silent bool, take func(*posternv1.KernelMessage)) (reply notebook.Reply, err error) {
	request, err := jupyter.New(jupyter.Shell, "execute_request", k.client, map[string]any{
		"code": code, "silent": silent, "store_history": !silent, "user_expressions": map[string]any{}, "allow_stdin": false, "stop_on_error": false,
	})
	if err != nil {
		return reply, err
	}
	h, err := jupyter.Check(request)
	if err != nil {
		return reply, proto.Errorf(proto.CodeInvalid, "the cell: %w", err)
	}
	if k.stream == nil {
		if err := k.attach(ctx, k.after > 0); err != nil {
			return reply, err
		}
	}
	if !silent {
		if err := k.stream.Record(ctx, h, request); err != nil {
			return reply, err
		}
	}
	// What the cell prints on its way out still belongs to it.
	work, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	var helpers sync.WaitGroup
	defer helpers.Wait()
	done := make(chan struct{})
	defer close(done)
	helpers.Go(func() { k.interruptWhen(ctx, work, cancel, done) })

	sent := false
	var away time.Time // since when there is no stream
	wait := attachFirst
	for replied, idle := false, false; !replied || !idle; {
		if k.stream == nil {
			if away.IsZero() {
				away = time.Now()
			}
			switch err := k.attach(work, true); {
			case err == nil:
				away, sent, wait = time.Time{}, false, attachFirst
			case work.Err() != nil:
				return reply, context.Cause(work)
			case !passes(err):
				return reply, err
			case time.Since(away) > awayTime:
				return reply, err
			default:
				select {
				case <-time.After(wait):
				case <-work.Done():
				}
				wait = min(2*wait, attachMost)
				continue
			}
		}
		m, err := k.receive(work, request, &sent)
		switch {
		case work.Err() != nil:
			k.leave()
			return reply, context.Cause(work)
		case errors.Is(err, errLost):
			k.leave()
			continue
		case err != nil:
			k.leave()
			return reply, err
		case m == nil:
			continue
		}
		head, err := jupyter.ParseHeader(m.Header)
		if err != nil {
			continue
		}
		parent, _ := jupyter.ParseHeader(m.ParentHeader)
		switch {
		case head.Type == "status":
			var status struct {
				State string `json:"execution_state"`
			}
			if json.Unmarshal(m.Content, &status) != nil {
				continue
			}
			if status.State == "dead" {
				return reply, proto.Errorf(proto.CodeCancelled, "the kernel ended while the cell ran: see postern kernel list")
			}
			idle = idle || status.State == "idle" && parent.ID == h.ID
		case parent.ID != h.ID:
		case head.Type == "execute_reply":
			if reply, err = notebook.ParseReply(m.Content); err != nil {
				return reply, err
			}
			replied = true
		case m.Channel == jupyter.IOPub:
			if k.saw != nil && !silent {
				k.saw(m)
			}
			take(m)
		}
	}
	return reply, nil
}

// interruptWhen interrupts the cell when ctx ends before done, and gives up on it after a
// while.
func (k *kernel) interruptWhen(ctx, work context.Context, cancel context.CancelCauseFunc, done <-chan struct{}) {
	select {
	case <-done:
		return
	case <-ctx.Done():
	}
	short, end := context.WithTimeout(work, interruptTime)
	defer end()
	interrupted := make(chan error, 1)
	go func() { interrupted <- k.kernels.Interrupt(short, k.caller, k.id) }()
	timer := time.NewTimer(settleTime)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		cancel(proto.Errorf(proto.CodeTimeout, "the cell goes on %s after it was interrupted", settleTime))
	}
	end()
	<-interrupted
}

// errLost is returned for a stream that ended without a word.
var errLost = errors.New("the kernel's stream was lost")

// passes reports whether an error may be gone at the next attempt.
func passes(err error) bool {
	switch proto.CodeOf(err) {
	case proto.CodeAgentOffline, proto.CodeAgentLost, proto.CodeUnavailable, proto.CodeOverloaded, proto.CodeTimeout:
		return true
	}
	return false
}

// receive returns the kernel's next message; nil for one that is none. It sends the request
// first, if this stream has not: the host drops what it has.
func (k *kernel) receive(work context.Context, request *posternv1.KernelMessage, sent *bool) (*posternv1.KernelMessage, error) {
	s := k.stream
	stop := context.AfterFunc(work, func() { _ = s.Close() })
	defer stop()
	if !*sent {
		if err := s.out.Message(request); err != nil {
			return nil, errLost
		}
		*sent = true
	}
	f, err := s.in.Next()
	if errors.Is(err, kernelstream.ErrMalformed) {
		return nil, &proto.Error{Code: proto.CodeInternal, Message: "the host's messages are not understood", Err: err}
	}
	if err != nil {
		return nil, errLost
	}
	switch f := f.Frame.(type) {
	case *posternv1.KernelFrame_Delivery:
		d := f.Delivery
		if d.Sequence <= k.after {
			return nil, nil // it came on an earlier stream
		}
		k.after = d.Sequence
		if s.in.Buffered() == 0 {
			if err := s.out.Confirm(k.after); err != nil {
				return nil, errLost
			}
		}
		if d.TruncatedFrom > 0 {
			k.note("output is missing: the host's journal was full, and dropped it before it could be sent")
		}
		return d.Message, nil
	case *posternv1.KernelFrame_End:
		switch err := kernelstream.EndError(&posternv1.KernelFrame{Frame: f}); {
		case err == nil:
			return nil, proto.Errorf(proto.CodeNotFound, "the kernel is gone: it was stopped")
		case passes(err):
			return nil, errLost
		default:
			return nil, err
		}
	}
	return nil, nil
}

// Checkpoint implements notebook.Checkpointer.
func (k *kernel) Checkpoint(ctx context.Context, state string) (string, error) {
	if k.plain {
		return "", nil
	}
	r, err := k.kernels.CheckpointKernel(ctx, k.caller, &posternv1.CheckpointKernelRequest{KernelId: k.id, Label: label + state, Wait: durationpb.New(checkpointWait)})
	return r.GetCheckpoint().GetId(), err
}

// Rollback implements notebook.Checkpointer.
func (k *kernel) Rollback(ctx context.Context, id string) error {
	return k.kernels.RollbackKernel(ctx, k.caller, &posternv1.KernelCheckpointRequest{KernelId: k.id, CheckpointId: id})
}

// Restart implements notebook.Checkpointer.
func (k *kernel) Restart(ctx context.Context) error { return k.kernels.Restart(ctx, k.caller, k.id) }

// stop stops a kernel that was started for a run, whatever became of ctx.
func (k *kernel) stop(ctx context.Context) {
	k.leave()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
	defer cancel()
	if err := k.kernels.Stop(ctx, k.caller, k.id); err != nil && proto.CodeOf(err) != proto.CodeNotFound {
		k.note(fmt.Sprintf("kernel %s was not stopped: %v", k.id, err))
	}
}
