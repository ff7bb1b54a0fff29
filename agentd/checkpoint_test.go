package main

import (
	"context"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

// TestCheckpointsThroughTheTunnel saves, rolls back, forks and suspends a kernel through
// the tunnel, kills agentd while it is suspended, and resumes it.
func TestCheckpointsThroughTheTunnel(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for kernels' namespaces")
	}
	criutest.Path(t)
	c := newTestControl(t)
	l := newLab(t, c, "sources: []\nkernels: {specs: [python3], warm: 0, uid_base: 1981000000}\n")
	p := startProcess(t, l, unwatched)
	up := c.awaitHello(1)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	saved := func(up *tunnel.Tunnel) posternv1connect.CheckpointHostServiceClient {
		return posternv1connect.NewCheckpointHostServiceClient(&http.Client{Transport: up.Transport(tunnel.Control)}, "http://agent")
	}
	api, ck := kernels(up), saved(up)
	id, fork := jupyter.NewID(), jupyter.NewID()
	if _, err := api.StartKernel(ctx, connect.NewRequest(&posternv1.StartKernelRequest{Id: id, Spec: "python3", Principal: ana})); err != nil {
		t.Fatal(err)
	}
	stopped := false
	t.Cleanup(func() {
		if stopped {
			return
		}
		for _, k := range []string{id, fork} {
			api.StopKernel(context.Background(), connect.NewRequest(&posternv1.KernelRequest{Id: k, Principal: ana})) //nolint:errcheck // the test failed already
		}
	})
	run := func(kernel, code string) string {
		t.Helper()
		stream, err := kernelstream.Dial(ctx, tunnelDoer{up}, &posternv1.KernelChannelsRequest{KernelId: kernel, Client: jupyter.NewID(), Principal: ana})
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close() //nolint:errcheck // it is done with
		_, wait := cell(t, stream, code)
		return wait()
	}
	of := func(checkpoint string) *connect.Request[posternv1.KernelCheckpointRequest] {
		return connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: id, CheckpointId: checkpoint, Principal: ana})
	}
	run(id, "n = 1; open('f', 'w').write('one')")
	if check, err := ck.CheckKernel(ctx, of("")); err != nil || len(check.Msg.Obstacles) != 0 {
		t.Errorf("check: %v, %v", check, err)
	}
	first, err := ck.CheckpointKernel(ctx, connect.NewRequest(&posternv1.CheckpointKernelRequest{KernelId: id, Label: "first", Principal: ana}))
	if err != nil {
		t.Fatal(err)
	}
	ckpt := first.Msg.Checkpoint.Id
	if first.Msg.Standstill.AsDuration() <= 0 || first.Msg.Checkpoint.Stored == 0 || !strings.HasPrefix(ckpt, "ckp_") {
		t.Errorf("%v", first.Msg)
	}
	// Whose they are.
	if _, err := ck.ListCheckpoints(ctx, connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: id, Principal: ben})); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("another's list: %v", err)
	}
	if _, err := ck.RollbackKernel(ctx, connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: id, CheckpointId: ckpt, Principal: olive})); proto.CodeOf(err) != proto.CodePolicyDenied {
		t.Errorf("an operator's rollback: %v", err)
	}
	if _, err := ck.RollbackKernel(ctx, of("ckp_00000000000000000000000000")); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("a rollback to nothing: %v", err)
	}

	run(id, "n = 2; open('f', 'w').write('two')")
	if k, err := ck.RollbackKernel(ctx, of(ckpt)); err != nil || k.Msg.Checkpoint != ckpt {
		t.Fatalf("%v, %v", k, err)
	}
	if got := run(id, "print(n, open('f').read())"); !strings.Contains(got, "1 one") {
		t.Errorf("after the rollback: %s", got)
	}
	forked, err := ck.ForkKernel(ctx, connect.NewRequest(&posternv1.ForkKernelRequest{KernelId: id, NewKernelId: fork, Principal: ana}))
	if err != nil || forked.Msg.Kernel.Id != fork {
		t.Fatalf("%v, %v", forked, err)
	}
	run(fork, "n = 10")
	if got := run(id, "n += 1; print(n)"); !strings.Contains(got, "2") {
		t.Errorf("the forked kernel: %s", got)
	}
	if got := run(fork, "print(n, open('f').read())"); !strings.Contains(got, "10 one") {
		t.Errorf("the fork: %s", got)
	}

	if _, err := ck.SuspendKernel(ctx, of("")); err != nil {
		t.Fatal(err)
	}
	p.signal(syscall.SIGKILL)
	p.cmd.Wait() //nolint:errcheck // it was killed
	p = startProcess(t, l, unwatched)
	up = c.awaitHello(2)
	api, ck = kernels(up), saved(up)
	poll(t, "the kernel to be suspended", func() bool {
		k, err := api.GetKernel(ctx, connect.NewRequest(&posternv1.KernelRequest{Id: id, Principal: ana}))
		return err == nil && k.Msg.State == posternv1.KernelState_KERNEL_STATE_SUSPENDED
	})
	if _, err := ck.ResumeKernel(ctx, of("")); err != nil {
		t.Fatal(err)
	}
	if got := run(id, "print(n, open('f').read())"); !strings.Contains(got, "2 one") {
		t.Errorf("after the resume: %s", got)
	}
	if list, err := ck.ListCheckpoints(ctx, of("")); err != nil || len(list.Msg.Checkpoints) != 3 || list.Msg.Checkpoints[1].Parent != ckpt {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := ck.ProtectCheckpoint(ctx, connect.NewRequest(&posternv1.ProtectCheckpointRequest{KernelId: id, CheckpointId: ckpt, On: true, Principal: ana})); err != nil {
		t.Error(err)
	}
	if _, err := ck.DeleteCheckpoint(ctx, of(ckpt)); err != nil {
		t.Error(err)
	}
	for _, k := range []string{id, fork} {
		if _, err := api.StopKernel(ctx, connect.NewRequest(&posternv1.KernelRequest{Id: k, Principal: ana})); err != nil {
			t.Errorf("stop: %v", err)
		}
	}
	stopped = true
	if entries, _ := os.ReadDir(l.path("state/kernels")); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
	p.signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	got := l.actions()
	for _, want := range []string{"kernel.checkpoint done", "kernel.rollback done", "kernel.rollback denied", "kernel.fork done", "kernel.suspend done", "kernel.resume done", "kernel.checkpoint.delete done"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %s", want, got)
		}
	}
}
