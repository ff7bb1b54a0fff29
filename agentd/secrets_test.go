package main

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
	"github.com/postern-dev/postern/e2e/simulatedvault"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

// secretLab is an agentd with a kernel, for tests of secrets.
type secretLab struct {
	*lab
	t  *testing.T
	up *tunnel.Tunnel
	id string
}

func (l *secretLab) api() posternv1connect.SecretHostServiceClient {
	return posternv1connect.NewSecretHostServiceClient(&http.Client{Transport: l.up.Transport(tunnel.Control)}, "http://agent")
}

func (l *secretLab) checkpoints() posternv1connect.CheckpointHostServiceClient {
	return posternv1connect.NewCheckpointHostServiceClient(&http.Client{Transport: l.up.Transport(tunnel.Control)}, "http://agent")
}

// put gives the kernel secrets: NAME and value in turns; the value "host" means the host's.
func (l *secretLab) put(who *posternv1.Principal, pairs ...string) (*posternv1.PutKernelSecretsResponse, error) {
	l.t.Helper()
	r := &posternv1.PutKernelSecretsRequest{KernelId: l.id, Principal: who}
	for i := 0; i < len(pairs); i += 2 {
		s := &posternv1.KernelSecret{Name: pairs[i], Value: []byte(pairs[i+1])}
		if pairs[i+1] == "host" {
			s.Value, s.FromHost = nil, true
		}
		r.Secrets = append(r.Secrets, s)
	}
	ctx, cancel := context.WithTimeout(l.t.Context(), 2*time.Minute)
	defer cancel()
	resp, err := l.api().PutKernelSecrets(ctx, connect.NewRequest(r))
	if err != nil {
		return nil, proto.FromConnect(err)
	}
	return resp.Msg, nil
}

// run executes a cell and returns the contents of what it printed.
func (l *secretLab) run(code string) string {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), 2*time.Minute)
	defer cancel()
	stream, err := kernelstream.Dial(ctx, tunnelDoer{l.up}, &posternv1.KernelChannelsRequest{KernelId: l.id, Client: jupyter.NewID(), Principal: ana})
	if err != nil {
		l.t.Fatal(err)
	}
	defer stream.Close() //nolint:errcheck // it is done with
	_, wait := cell(l.t, stream, code)
	return wait()
}

// startKernel starts the lab's kernel.
func (l *secretLab) startKernel() {
	l.t.Helper()
	l.id = jupyter.NewID()
	l.t.Cleanup(func() { endKernels(l.t, l.path("state/kernels")) }) // what a test that fails leaves
	if _, err := kernels(l.up).StartKernel(l.t.Context(), connect.NewRequest(&posternv1.StartKernelRequest{Id: l.id, Spec: "python3", Principal: ana})); err != nil {
		l.t.Fatal(err)
	}
}

// stopKernel stops it.
func (l *secretLab) stopKernel() {
	l.t.Helper()
	if _, err := kernels(l.up).StopKernel(l.t.Context(), connect.NewRequest(&posternv1.KernelRequest{Id: l.id, Principal: ana})); err != nil {
		l.t.Error(err)
	}
}

// nowhere fails the test if a file of the lab has a value.
func (l *secretLab) nowhere(values ...string) {
	l.t.Helper()
	err := filepath.WalkDir(l.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		for _, v := range values {
			if bytes.Contains(text, []byte(v)) {
				l.t.Errorf("%s holds a value", path)
			}
		}
		return err
	})
	if err != nil {
		l.t.Error(err)
	}
}

func newCanary(name string) string { return "canary-" + name + "-" + jupyter.NewID() }

// TestSecretsOfKernels gives a kernel secrets through the tunnel, kills agentd, sets them
// anew, and takes them back by the policy.
func TestSecretsOfKernels(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for kernels' namespaces")
	}
	c := newTestControl(t)
	const settings = "sources: []\nkernels: {specs: [python3], warm: 0, uid_base: 1982000000%s}\n"
	l := &secretLab{lab: newLab(t, c, fmt.Sprintf(settings, "")), t: t}
	p := startProcess(t, l.lab, unwatched)
	l.up = c.awaitHello(1)
	l.startKernel()
	first, second := newCanary("first"), newCanary("second")

	// By default nothing is taken.
	got, err := l.put(ana, "TOKEN", first)
	if err != nil || len(got.Refused) != 1 || got.Refused[0].Reason != "this host takes no secrets from the control plane: set kernels.secrets.control_plane: allow in agentd.yaml" {
		t.Fatalf("by default: %v, %v", got, err)
	}
	if got, err := l.put(ana, "TOKEN", "host"); err != nil || len(got.Refused) != 1 || !strings.Contains(got.Refused[0].Reason, "kernels.secrets.vault") {
		t.Errorf("the host's: %v, %v", got, err)
	}
	if got := l.run("import os; print('TOKEN' in os.environ)"); !strings.Contains(got, "False") {
		t.Errorf("printed %s", got)
	}
	l.configure(fmt.Sprintf(settings, ", secrets: {control_plane: allow}"))
	p.reload()
	if got, err = l.put(ana, "TOKEN", first); err != nil || len(got.Refused) != 0 || got.Waiting || got.Unchanged {
		t.Fatalf("allowed: %v, %v", got, err)
	}
	for name, test := range map[string]struct {
		who   *posternv1.Principal
		pairs []string
		want  proto.Code
	}{
		"another's kernel": {ben, []string{"TOKEN", first}, proto.CodeNotFound},
		"bad name":         {ana, []string{"LD_PRELOAD", first}, proto.CodeInvalid},
		"short value":      {ana, []string{"PIN", "1234567"}, proto.CodeInvalid},
		"twice":            {ana, []string{"TOKEN", first, "TOKEN", second}, proto.CodeInvalid},
	} {
		if got, err := l.put(test.who, test.pairs...); proto.CodeOf(err) != test.want || strings.Contains(fmt.Sprint(err), "canary") {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	if got := l.run("print(len(os.environ['TOKEN']), os.environ['TOKEN'])"); !strings.Contains(got, fmt.Sprintf("%d [secret TOKEN]", len(first))) {
		t.Errorf("printed %s", got)
	}
	if got, err := l.put(ana, "TOKEN", first); err != nil || !got.Unchanged {
		t.Errorf("once more: %v, %v", got, err)
	}

	// Agentd is killed, and so is the shim: whoever comes next knows what to keep in.
	p.signal(syscall.SIGKILL)
	p.cmd.Wait() //nolint:errcheck // it was killed
	p = startProcess(t, l.lab, unwatched)
	l.up = c.awaitHello(2)
	if got := l.run("print(os.environ['TOKEN'])"); !strings.Contains(got, "[secret TOKEN]") {
		t.Errorf("after a kill of agentd: %s", got)
	}
	killShims(t, l.path("state/kernels"))
	poll(t, "another shim", func() bool {
		stream, err := kernelstream.Dial(t.Context(), tunnelDoer{l.up}, &posternv1.KernelChannelsRequest{KernelId: l.id, Client: "x", Principal: ana})
		if err != nil {
			return false
		}
		return stream.Close() == nil
	})
	if got := l.run("print(os.environ['TOKEN'])"); !strings.Contains(got, "[secret TOKEN]") {
		t.Errorf("after a kill of the shim: %s", got)
	}
	// Set anew by an operator; the old value is kept in, too.
	l.run("old = os.environ['TOKEN']")
	if got, err := l.put(olive, "TOKEN", second); err != nil || got.Waiting {
		t.Errorf("rotated: %v, %v", got, err)
	}
	if got := l.run("print(old, os.environ['TOKEN'], old != os.environ['TOKEN'])"); !strings.Contains(got, "[secret TOKEN] [secret TOKEN] True") {
		t.Errorf("after the rotation: %s", got)
	}
	// The policy takes it back.
	l.configure(fmt.Sprintf(settings, ""))
	p.reload()
	poll(t, "the secret to be taken back", func() bool { return strings.Contains(l.run("print('TOKEN' in os.environ)"), "False") })

	l.stopKernel()
	p.signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	if text := p.log.String(); strings.Contains(text, "canary") {
		t.Errorf("the log has a value: %s", text)
	}
	l.nowhere(first, second)
	told := ""
	for _, e := range l.entries() {
		if e.Action == "kernel.secrets" {
			told += fmt.Sprintf("%s %s %s: %s\n", e.Actor, e.Verdict, e.Outcome, e.Statement)
		}
	}
	for _, want := range []string{"denied done: has: ; refused: TOKEN", "allowed done: has: TOKEN\n", "token ben denied failed", "host allowed done: has: \n", "token olive"} {
		if !strings.Contains(told, want) {
			t.Errorf("no %q in\n%s", want, told)
		}
	}
}

// killShims kills the shims of all kernels with signal 9.
func killShims(t *testing.T, dir string) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, path := range all {
		text, _ := os.ReadFile(path)
		args := strings.Split(string(text), "\x00")
		if len(args) < 3 || args[1] != "kernel-shim" || !strings.HasPrefix(args[2], dir) {
			continue
		}
		var pid int
		if _, err := fmt.Sscanf(path, "/proc/%d/cmdline", &pid); err == nil && syscall.Kill(pid, syscall.SIGKILL) == nil {
			n++
		}
	}
	if n == 0 {
		t.Fatal("no shim was found")
	}
}

// TestSecretsAndCheckpoints shows that a restored kernel has its secrets, in the value that
// they have now, and that no checkpoint holds one.
func TestSecretsAndCheckpoints(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for kernels' namespaces")
	}
	criutest.Path(t)
	c := newTestControl(t)
	l := &secretLab{lab: newLab(t, c, "sources: []\nkernels: {specs: [python3], warm: 0, uid_base: 1983000000, secrets: {control_plane: allow}}\n"), t: t}
	l.start()
	defer l.stop()
	l.up = c.awaitHello(1)
	l.startKernel()
	first, second := newCanary("first"), newCanary("second")
	if _, err := l.put(ana, "TOKEN", first); err != nil {
		t.Fatal(err)
	}
	l.run("import os; n = len(os.environ['TOKEN'])")
	saved, err := l.checkpoints().CheckpointKernel(t.Context(), connect.NewRequest(&posternv1.CheckpointKernelRequest{KernelId: l.id, Principal: ana}))
	if err != nil {
		t.Fatal(err)
	}
	if got := l.run("print(os.environ['TOKEN'])"); !strings.Contains(got, "[secret TOKEN]") {
		t.Errorf("after a checkpoint: %s", got)
	}
	if _, err := l.put(ana, "TOKEN", second); err != nil {
		t.Fatal(err)
	}
	if _, err := l.checkpoints().RollbackKernel(t.Context(), connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: l.id, CheckpointId: saved.Msg.Checkpoint.Id, Principal: ana})); err != nil {
		t.Fatal(err)
	}
	if got := l.run("print(os.environ['TOKEN'].endswith('" + second[len(second)-7:] + "'))"); !strings.Contains(got, "True") {
		t.Errorf("after the rollback it has not the new value: %s", got)
	}
	if _, err := l.checkpoints().SuspendKernel(t.Context(), connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: l.id, Principal: ana})); err != nil {
		t.Fatal(err)
	}
	if got, err := l.put(ana, "TOKEN", first); err != nil || !got.Later {
		t.Errorf("while it is suspended: %v, %v", got, err)
	}
	if _, err := l.checkpoints().ResumeKernel(t.Context(), connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: l.id, Principal: ana})); err != nil {
		t.Fatal(err)
	}
	if got := l.run("print(os.environ['TOKEN'].endswith('" + first[len(first)-7:] + "'), n)"); !strings.Contains(got, "True") {
		t.Errorf("after the resume it has not the newest value: %s", got)
	}
	l.nowhere(first, second)
	l.stopKernel()
}

// TestSecretsFromVault gives a kernel what the host reads from Vault.
func TestSecretsFromVault(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for kernels' namespaces")
	}
	v := simulatedvault.Start(simulatedvault.Config{})
	defer v.Close()
	first, second := newCanary("first"), newCanary("second")
	v.Put("team/token", map[string]any{"value": first, "other": "x"})
	c := newTestControl(t)
	l := &secretLab{lab: newLab(t, c, "sources: []\n"), t: t}
	for name, text := range map[string]string{"vault.token": simulatedvault.RootToken, "vault.pem": string(v.CA())} {
		if err := os.WriteFile(l.path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	l.configure(fmt.Sprintf(`sources: []
vault: {address: '%s', ca_file: '%s', token: {file: '%s'}}
kernels:
  specs: [python3]
  warm: 0
  uid_base: 1984000000
  secrets: {control_plane: allow, vault: {TEAM: {path: secret/team/token}, GONE: {path: secret/team/gone}}}
`, v.URL(), l.path("vault.pem"), l.path("vault.token")))
	p := startProcess(t, l.lab, unwatched)
	l.up = c.awaitHello(1)
	l.startKernel()
	got, err := l.put(ana, "TEAM", "host", "GONE", "host", "OTHER", "host", "TOKEN", "from the control plane")
	if err != nil || len(got.Refused) != 2 || got.Refused[0].Name != "GONE" || got.Refused[1].Name != "OTHER" {
		t.Fatalf("%v, %v", got, err)
	}
	if got := l.run("import os; print(os.environ['TEAM'], os.environ['TOKEN'], len(os.environ['TEAM']))"); !strings.Contains(got, fmt.Sprintf("[secret TEAM] [secret TOKEN] %d", len(first))) {
		t.Errorf("printed %s", got)
	}
	// The host's name is not the control plane's to set.
	if got, err := l.put(ana, "TEAM", "from the control plane"); err != nil || len(got.Refused) != 1 || !strings.Contains(got.Refused[0].Reason, "this host reads that one from Vault") {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := l.put(ana, "TEAM", "host"); err != nil {
		t.Fatal(err)
	}
	// It is read again; what can't be read stays as it is.
	v.Seal(true)
	p.reload()
	if got := l.run("print(os.environ['TEAM'])"); !strings.Contains(got, "[secret TEAM]") {
		t.Errorf("while Vault is sealed: %s", got)
	}
	v.Seal(false)
	v.Put("team/token", map[string]any{"value": second})
	p.reload()
	poll(t, "the new value", func() bool {
		return strings.Contains(l.run("print(os.environ['TEAM'].endswith('"+second[len(second)-7:]+"'))"), "True")
	})
	l.stopKernel()
	p.signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	if text := p.log.String(); strings.Contains(text, "canary") {
		t.Errorf("the log has a value: %s", text)
	}
	l.nowhere(first, second)
}
