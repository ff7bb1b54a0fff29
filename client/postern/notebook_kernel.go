package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/notebook"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// settleTime is how long an interrupted cell may take to end.
const settleTime = 30 * time.Second

// notebookKernel runs a notebook's cells in a kernel of an agent.
type notebookKernel struct {
	a     *app
	c     *client.Client
	agent string
	id    string

	channels *client.KernelChannels
}

var (
	_ notebook.Kernel       = (*notebookKernel)(nil)
	_ notebook.Checkpointer = (*notebookKernel)(nil)
)

// attach opens the kernel's channels.
func (k *notebookKernel) attach(ctx context.Context) (err error) {
	k.channels, err = k.c.KernelChannels(ctx, k.agent, k.id, jupyter.NewID())
	return err
}

func (k *notebookKernel) close() {
	if k.channels != nil {
		k.channels.Close()
	}
}

// ready waits until the kernel answers: it can't be saved before.
func (k *notebookKernel) ready(ctx context.Context) error {
	_, err := k.execute(ctx, "", true, func(*posternv1.KernelMessage) {})
	return err
}

// Execute implements notebook.Kernel.
func (k *notebookKernel) Execute(ctx context.Context, code string, take func(*posternv1.KernelMessage)) (notebook.Reply, error) {
	return k.execute(ctx, code, false, take)
}

func (k *notebookKernel) execute(ctx context.Context, code string, silent bool, take func(*posternv1.KernelMessage)) (notebook.Reply, error) {
	request, err := jupyter.New(jupyter.Shell, "execute_request", k.channels.Session(), map[string]any{
		"code": code, "silent": silent, "store_history": !silent, "user_expressions": map[string]any{}, "allow_stdin": false, "stop_on_error": false,
	})
	if err != nil {
		return notebook.Reply{}, err
	}
	h, err := jupyter.ParseHeader(request.Header)
	if err != nil {
		return notebook.Reply{}, err
	}
	if err := k.channels.Send(ctx, request); err != nil {
		return notebook.Reply{}, err
	}
	work, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() {
		// What the cell prints on its way out still belongs to it.
		timer := time.AfterFunc(settleTime, func() {
			cancel(fmt.Errorf("the cell goes on %s after it was interrupted", settleTime))
		})
		context.AfterFunc(work, func() { timer.Stop() })
		short, done := context.WithTimeout(work, interruptTime)
		defer done()
		if _, err := k.c.Kernels.InterruptKernel(short, connect.NewRequest(&posternv1.AgentKernelRequest{KernelId: k.id})); err != nil && work.Err() == nil {
			k.a.info("the cell was not interrupted: %s", message(err))
		}
	})
	defer stop()
	var reply notebook.Reply
	for replied, idle := false, false; !replied || !idle; {
		m, err := k.channels.Receive(work)
		switch {
		case errors.Is(err, io.EOF):
			return reply, proto.Errorf(proto.CodeNotFound, "the kernel is gone: it was stopped")
		case work.Err() != nil:
			return reply, context.Cause(work)
		case err != nil:
			return reply, err
		}
		head, err := jupyter.ParseHeader(m.Header)
		if err != nil {
			continue
		}
		parent, _ := jupyter.ParseHeader(m.ParentHeader)
		if head.Type == "status" {
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
			continue
		}
		switch {
		case parent.ID != h.ID:
		case head.Type == "execute_reply":
			if reply, err = notebook.ParseReply(m.Content); err != nil {
				return reply, err
			}
			replied = true
		case m.Channel == jupyter.IOPub:
			take(m)
		}
	}
	return reply, nil
}

// checkpointWait is how long what still runs in the kernel (a client of somebody
// else's) may go on before it is saved.
const checkpointWait = 10 * time.Second

// Checkpoint implements notebook.Checkpointer.
func (k *notebookKernel) Checkpoint(ctx context.Context, label string) (string, error) {
	resp, err := k.c.Checkpoints.CheckpointKernel(ctx, connect.NewRequest(&posternv1.CheckpointKernelRequest{
		KernelId: k.id, Label: notebookLabel + label, Wait: durationpb.New(checkpointWait),
	}))
	if err != nil {
		return "", err
	}
	return resp.Msg.Checkpoint.GetId(), nil
}

// notebookLabel begins the labels of checkpoints that a watch makes.
const notebookLabel = "notebook "

// Rollback implements notebook.Checkpointer.
func (k *notebookKernel) Rollback(ctx context.Context, id string) error {
	_, err := k.c.Checkpoints.RollbackKernel(ctx, connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: k.id, CheckpointId: id}))
	return err
}

// Restart implements notebook.Checkpointer.
func (k *notebookKernel) Restart(ctx context.Context) error {
	_, err := k.c.Kernels.RestartKernel(ctx, connect.NewRequest(&posternv1.AgentKernelRequest{KernelId: k.id}))
	return err
}
