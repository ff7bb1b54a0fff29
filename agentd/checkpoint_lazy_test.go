package main

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

// TestALargeKernelComesBackLazily resumes a kernel over lazyAbove: its memory is what it was.
// With POSTERN_LONG it is forked and rolled back, too, and comes back eagerly, and says why,
// when its processes share memory; package shim tests that with less.
func TestALargeKernelComesBackLazily(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for kernels' namespaces")
	}
	criutest.Path(t)
	c := newTestControl(t)
	l := newLab(t, c, "sources: []\nkernels: {specs: [python3], warm: 0, uid_base: 1984000000}\n")
	startProcess(t, l, unwatched)
	up := c.awaitHello(1)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	api := kernels(up)
	ck := posternv1connect.NewCheckpointHostServiceClient(&http.Client{Transport: up.Transport(tunnel.Control)}, "http://agent")
	id, fork := jupyter.NewID(), jupyter.NewID()
	if _, err := api.StartKernel(ctx, connect.NewRequest(&posternv1.StartKernelRequest{Id: id, Spec: "python3", Principal: ana})); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, k := range []string{id, fork} {
			api.StopKernel(context.Background(), connect.NewRequest(&posternv1.KernelRequest{Id: k, Principal: ana})) //nolint:errcheck // it may not be there
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
	// came waits until a kernel's shim has said n times that all memory of a lazy restore came.
	came := func(kernel string, n int) {
		t.Helper()
		poll(t, "all memory to be there", func() bool {
			text, err := os.ReadFile(filepath.Join(l.path("state"), kernelsDir, kernel, "shim.log"))
			return err == nil && strings.Count(string(text), "all memory of the restored kernel is there") == n
		})
	}
	whole := "n += 1; print(n, zlib.crc32(big) == was)"
	run(id, "import os, time, zlib; big = os.urandom(1 << 20) * 280; was = zlib.crc32(big); n = 0")
	of := func(checkpoint string) *connect.Request[posternv1.KernelCheckpointRequest] {
		return connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: id, CheckpointId: checkpoint, Principal: ana})
	}
	if _, err := ck.SuspendKernel(ctx, of("")); err != nil {
		t.Fatal(err)
	}
	if k, err := ck.ResumeKernel(ctx, of("")); err != nil || strings.Contains(k.Msg.Notice, "eagerly") {
		t.Fatalf("%v, %v", k, err)
	}
	if got := run(id, whole); !strings.Contains(got, "1 True") {
		t.Errorf("after the resume: %s", got)
	}
	came(id, 1)
	if os.Getenv("POSTERN_LONG") == "" {
		return
	}
	first, err := ck.CheckpointKernel(ctx, connect.NewRequest(&posternv1.CheckpointKernelRequest{KernelId: id, Principal: ana}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ck.ForkKernel(ctx, connect.NewRequest(&posternv1.ForkKernelRequest{KernelId: id, NewKernelId: fork, CheckpointId: first.Msg.Checkpoint.Id, Principal: ana})); err != nil {
		t.Fatal(err)
	}
	if got := run(fork, whole); !strings.Contains(got, "2 True") {
		t.Errorf("the fork: %s", got)
	}
	came(fork, 1)
	if _, err := ck.RollbackKernel(ctx, of(first.Msg.Checkpoint.Id)); err != nil {
		t.Fatal(err)
	}
	if got := run(id, whole); !strings.Contains(got, "2 True") {
		t.Errorf("after the rollback: %s", got)
	}
	came(id, 2)

	run(id, "if os.fork() == 0:\n    time.sleep(10_000)")
	if _, err := ck.SuspendKernel(ctx, of("")); err != nil {
		t.Fatal(err)
	}
	if k, err := ck.ResumeKernel(ctx, of("")); err != nil || !strings.HasPrefix(k.Msg.Notice, "restored eagerly: its processes may share memory") {
		t.Fatalf("%v, %v", k, err)
	}
	if got := run(id, whole); !strings.Contains(got, "3 True") {
		t.Errorf("after the eager resume: %s", got)
	}
}
