package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/agentd/attach/mountd"
	"github.com/postern-dev/postern/agentd/attach/remote/simulatedremote"
	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

// TestKernelMounts gives two kernels a workspace, kills what serves it and agentd with
// files open, saves and restores a kernel with a file open and mapped, and wants nothing
// to be left when the kernels have ended.
func TestKernelMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for kernels' namespaces")
	}
	criutest.Path(t)
	data, scratch := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(data, "table"), []byte("rows"), 0o644); err != nil {
		t.Fatal(err)
	}
	for dir, mode := range map[string]os.FileMode{data: 0o755, scratch: 0o777} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
	}
	c := newTestControl(t)
	c.attach = simulatedremote.Handler(simulatedremote.New())
	m := &mounts{lab: newLab(t, c, "sources: []\nkernels: {specs: [python3], warm: 0, uid_base: 1983000000}\nattachments: {workspaces: ['lab*'], read_only: [labro], binds: [{name: data, path: "+data+", read_only: true}, {name: scratch, path: "+scratch+"}, {name: gone, path: "+data+"/gone}]}\n")}
	t.Cleanup(m.clean)
	p := startProcess(t, m.lab, unwatched)
	up := c.awaitHello(1)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	saved := func(up *tunnel.Tunnel) posternv1connect.CheckpointHostServiceClient {
		return posternv1connect.NewCheckpointHostServiceClient(&http.Client{Transport: up.Transport(tunnel.Control)}, "http://agent")
	}
	api := kernels(up)
	t.Cleanup(func() { endKernels(t, m.path("state/kernels")) }) // what a test that fails leaves

	start := func(mounts ...*posternv1.KernelMount) (string, error) {
		id := jupyter.NewID()
		k, err := api.StartKernel(ctx, connect.NewRequest(&posternv1.StartKernelRequest{Id: id, Spec: "python3", Principal: ana, Mounts: mounts}))
		if err == nil && len(k.Msg.Mounts) != len(mounts) {
			err = fmt.Errorf("the kernel says that it has %v", k.Msg.Mounts)
		}
		return id, err
	}
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
	for name, mounts := range map[string][]*posternv1.KernelMount{
		"not named":         {{Workspace: "secret"}},
		"twice":             {{Workspace: "lab"}, {Workspace: "lab", ReadOnly: true}},
		"no name":           {{Workspace: "../lab"}},
		"may only be read":  {{Workspace: "labro"}},
		"one of them is no": {{Workspace: "lab"}, {Workspace: "secret"}},
	} {
		if _, err := start(mounts...); proto.CodeOf(err) != proto.CodePolicyDenied {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := start(&posternv1.KernelMount{Workspace: "data"}); proto.CodeOf(err) != proto.CodePolicyDenied {
		t.Errorf("a directory that may only be read: %v", err)
	}
	if _, err := start(&posternv1.KernelMount{Workspace: "gone"}); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("a directory that is not there: %v", err)
	}
	one, err := start(&posternv1.KernelMount{Workspace: "lab"}, &posternv1.KernelMount{Workspace: "data", ReadOnly: true}, &posternv1.KernelMount{Workspace: "scratch"}, &posternv1.KernelMount{Workspace: "labro", ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := run(one, "import os; print(os.getcwd()); f = open('a', 'w+'); f.write('first'); f.flush(); os.fsync(f.fileno()); print(os.listdir('.'))"); !strings.Contains(got, "/work/lab") || !strings.Contains(got, "['a']") {
		t.Errorf("the working directory: %s", got)
	}
	if got := run(one, "open('/work/labro/x', 'w')"); !strings.Contains(got, "Read-only file system") {
		t.Errorf("a write where nothing may be changed: %s", got)
	}
	if got := run(one, "print(open('/work/data/table').read()); open('/work/scratch/out', 'w').write('made'); open('/work/data/x', 'w')"); !strings.Contains(got, "rows") || !strings.Contains(got, "Read-only file system") {
		t.Errorf("directories of the host: %s", got)
	}
	if text, err := os.ReadFile(filepath.Join(scratch, "out")); err != nil || string(text) != "made" {
		t.Errorf("what the kernel wrote into a directory of the host: %q, %v", text, err)
	}
	// Read-only for one kernel alone.
	two, err := start(&posternv1.KernelMount{Workspace: "lab", ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := run(two, "print(open('a').read()); open('a', 'a')"); !strings.Contains(got, "first") || !strings.Contains(got, "Read-only file system") {
		t.Errorf("the other kernel: %s", got)
	}

	// mountd dies, agentd dies; the open file does not notice.
	s, err := mountd.Client{Dir: m.path("state/attach")}.Status(ctx)
	if err != nil || len(s.Holders) != 3 {
		t.Fatalf("%+v, %v", s, err)
	}
	if err := syscall.Kill(s.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if got := run(one, "f.write(' second'); f.flush(); f.seek(0); print(f.read())"); !strings.Contains(got, "first second") {
		t.Errorf("after kill -9 of mountd: %s", got)
	}
	p.signal(syscall.SIGKILL)
	p.cmd.Wait() //nolint:errcheck // it was killed
	p = startProcess(t, m.lab, unwatched)
	up = c.awaitHello(2)
	api = kernels(up)
	ck := saved(up)
	if got := run(one, "f.write(' third'); f.flush(); f.seek(0); print(f.read())"); !strings.Contains(got, "first second third") {
		t.Errorf("after kill -9 of agentd: %s", got)
	}

	// Saved and restored with the file open, and another mapped.
	run(one, "import mmap; g = open('b', 'w+b'); g.write(b'x' * 8192); g.flush(); mm = mmap.mmap(g.fileno(), 8192); mm[0:4] = b'mmap'")
	of := connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: one, Principal: ana})
	if _, err := ck.SuspendKernel(ctx, of); err != nil {
		t.Fatal(err)
	}
	if _, err := ck.ResumeKernel(ctx, of); err != nil {
		t.Fatal(err)
	}
	if got := run(one, "f.write(' fourth'); f.flush(); f.seek(0); mm[4:8] = b'more'; mm.flush(); g.seek(0); print(f.read(), g.read(9))"); !strings.Contains(got, "first second third fourth") || !strings.Contains(got, "mmapmorex") {
		t.Errorf("after suspend and resume: %s", got)
	}
	if got := run(two, "print(open('b', 'rb').read(9))"); !strings.Contains(got, "mmapmorex") {
		t.Errorf("what the other kernel sees of it: %s", got)
	}

	// A fork holds the mounts itself: they outlive the kernel that it came from.
	fork := jupyter.NewID()
	if forked, err := ck.ForkKernel(ctx, connect.NewRequest(&posternv1.ForkKernelRequest{KernelId: one, NewKernelId: fork, Principal: ana})); err != nil || len(forked.Msg.Kernel.Mounts) != 4 {
		t.Fatalf("%v, %v", forked, err)
	}
	for _, id := range []string{one, two} {
		if _, err := api.StopKernel(ctx, connect.NewRequest(&posternv1.KernelRequest{Id: id, Principal: ana})); err != nil {
			t.Error(err)
		}
	}
	if got := run(fork, "f.write(' fork'); f.flush(); print(open('a').read(), open('/work/data/table').read())"); !strings.Contains(got, "fourth fork rows") {
		t.Errorf("the fork: %s", got)
	}
	for _, id := range []string{fork} {
		if _, err := api.StopKernel(ctx, connect.NewRequest(&posternv1.KernelRequest{Id: id, Principal: ana})); err != nil {
			t.Error(err)
		}
	}
	m.eventually("no mounts without kernels", func() error {
		s, err := mountd.Client{Dir: m.path("state/attach")}.Status(ctx)
		if err == nil && len(s.Holders) > 0 {
			err = fmt.Errorf("%+v", s.Holders)
		}
		if left, _ := filepath.Glob(m.path("state/attach/kernels/*")); len(left) > 0 && err == nil {
			err = errors.New("left: " + strings.Join(left, " "))
		}
		return err
	})
	p.signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
}
