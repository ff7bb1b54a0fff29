package shim

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
	"github.com/postern-dev/postern/agentd/kernel/internal/runsock"
	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	module "github.com/postern-dev/postern/agentd/kernel/python"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const moduleTarget = "/srv/postern/python"

// withModule lets a kernel import the module postern, as agentd does.
func withModule(t *testing.T) func(*Spec) {
	t.Helper()
	dir, err := module.Install(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return func(s *Spec) {
		s.Sandbox.Dir = sandbox.HomeInside
		s.Sandbox.Binds = append(s.Sandbox.Binds, sandbox.Bind{Source: dir, Target: moduleTarget, ReadOnly: true, Key: "python"})
		s.Sandbox.Argv = append(s.Sandbox.Argv, "--IPKernelApp.extra_extensions="+module.Extension)
		s.Sandbox.Env = append(s.Sandbox.Env, "PYTHONPATH="+moduleTarget)
	}
}

// canary makes a value that is nowhere else, this file included.
func canary(name string) string {
	return "canary-" + name + "-" + strings.ReplaceAll(jupyter.NewID(), "-", "x")
}

func secretsOf(pairs ...string) Secrets {
	var all Secrets
	for i := 0; i < len(pairs); i += 2 {
		all.Current = append(all.Current, Secret{Name: pairs[i], Value: []byte(pairs[i+1])})
	}
	return all
}

// nowhere fails the test if a value is in a file below a directory.
func nowhere(t *testing.T, dir string, values ...string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		for _, v := range values {
			for what, form := range map[string]string{"itself": v, "base64": base64.StdEncoding.EncodeToString([]byte(v))[:8]} {
				if bytes.Contains(text, []byte(form)) {
					t.Errorf("%s holds the value (%s)", path, what)
				}
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// inMemory counts a value in the memory of a process and its descendants.
func inMemory(t *testing.T, pid int, value string) int {
	t.Helper()
	n := 0
	for _, p := range descendants(t, pid) {
		maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", p))
		if err != nil {
			t.Fatal(err)
		}
		mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", p))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(maps)) {
			var from, to int64
			var mode string
			if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil || !strings.HasPrefix(mode, "rw") {
				continue
			}
			area := make([]byte, to-from)
			got, _ := mem.ReadAt(area, from)
			n += bytes.Count(area[:got], []byte(value))
		}
		mem.Close()
	}
	return n
}

func descendants(t *testing.T, pid int) []int {
	t.Helper()
	all := []int{pid}
	children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range children {
		text, _ := os.ReadFile(path)
		for _, f := range strings.Fields(string(text)) {
			var child int
			if _, err := fmt.Sscan(f, &child); err == nil {
				all = append(all, descendants(t, child)...)
			}
		}
	}
	return all
}

func TestSecretsReachTheKernel(t *testing.T) {
	dir, _ := newSpec(t, withModule(t))
	a, process := spawn(t, dir)
	p := attach(t, a, "one")
	p.run("import os, sys, subprocess")
	first, second, quiet := canary("first"), canary("second"), canary("quiet")
	if put, err := a.SetSecrets(soon(t), secretsOf("TOKEN", first, "QUIET", quiet)); err != nil || put != (Put{}) {
		t.Fatalf("put: %+v, %v", put, err)
	}
	long := fmt.Sprint(len(first))
	if got := p.run("print(len(os.environ['TOKEN']), os.getenv('TOKEN')[:6], 'TOKEN' in os.environ, In[-1][:5], _oh)"); got != long+" canary True print {}\n" {
		t.Errorf("the kernel has %q", got)
	}
	// Nothing printed has it, in whatever form and however cut.
	for code, want := range map[string]string{
		"print(os.environ['TOKEN'])":                                     "[secret TOKEN]\n",
		"os.environ['TOKEN']":                                            "'[secret TOKEN]'",
		"{'a': [os.environ['TOKEN']]}":                                   "{'a': ['[secret TOKEN]']}",
		"import base64; base64.b64encode(b'ab' + os.environb[b'TOKEN'])": "",
		"print(os.environ['TOKEN'].encode().hex())":                      "[secret TOKEN]\n",
		"for c in os.environ['TOKEN']: print(c, end='', flush=True)":     "[secret TOKEN]",
		"import json; print(json.dumps(dict(os.environ))[-200:])":        "",
		"sys.stderr.write(os.environ['TOKEN'] + '\\n'); None":            "[secret TOKEN]\n",
	} {
		got := p.run(code)
		if strings.Contains(got, first) || want != "" && got != want {
			t.Errorf("%s: printed %q", code, got)
		}
	}
	// (A cell that fails makes ipykernel drop what comes right after it, unless told not to.)
	_, reply := p.result(p.send(jupyter.Shell, "execute_request", map[string]any{"code": "raise ValueError(os.environ['TOKEN'])", "silent": false, "stop_on_error": false}))
	if text := fmt.Sprint(reply.content); strings.Contains(text, first) || !strings.Contains(text, "[secret TOKEN]") {
		t.Errorf("traceback: %s", text)
	}
	_, reply = p.result(p.send(jupyter.Shell, "execute_request", map[string]any{"code": "", "silent": true, "user_expressions": map[string]string{"x": "os.environ['TOKEN']"}}))
	if text := fmt.Sprint(reply.content); strings.Contains(text, first) || !strings.Contains(text, "[secret TOKEN]") {
		t.Errorf("user expression: %s", text)
	}
	// The process's environment, and that of what it starts, do not have it.
	detail, err := a.Detail(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	p.run("child = subprocess.Popen(['sleep', '100'])")
	for _, pid := range append(descendants(t, detail.InitPID), process.Pid) {
		for _, name := range []string{"environ", "cmdline"} {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(text, []byte(first)) || bytes.Contains(text, []byte(quiet)) {
				t.Errorf("/proc/%d/%s has a value", pid, name)
			}
		}
	}
	p.run("child.kill(); child.wait()")

	// Set anew, also while a cell runs; what it was before is kept in still.
	busy := p.execute("import time\nwhile os.environ.get('TOKEN', '').endswith('" + first[len(first)-6:] + "'): time.sleep(0.01)\nprint('new', len(os.environ['TOKEN']))")
	p.until("busy", func(g got) bool { return g.parent == busy && g.kind == "execute_input" })
	now := secretsOf("TOKEN", second, "QUIET", quiet)
	now.Old = []Secret{{Name: "TOKEN", Value: []byte(first)}}
	if put, err := a.SetSecrets(soon(t), now); err != nil || put != (Put{}) {
		t.Fatalf("put: %+v, %v", put, err)
	}
	if got, _ := p.result(busy); got != fmt.Sprintf("new %d\n", len(second)) {
		t.Errorf("after the rotation: %q", got)
	}
	p.run("kept = '" + first[:20] + "' + '" + first[20:] + "'")
	if got := p.run("print(kept, os.environ['TOKEN'])"); got != "[secret TOKEN] [secret TOKEN]\n" {
		t.Errorf("printed %q", got)
	}

	// A shim that is killed leaves nothing behind; the next one knows them from its start.
	if err := process.Kill(); err != nil {
		t.Fatal(err)
	}
	_, _ = process.Wait()
	next, err := SpawnWith(soon(t), "/proc/self/exe", dir, now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = a.Stop(soon(t))
		_, _ = next.Wait()
	})
	waitState(t, a, posternv1.KernelState_KERNEL_STATE_IDLE)
	p = attach(t, a, "one", resume)
	if got := p.run("print(os.environ['TOKEN'], kept)"); got != "[secret TOKEN] [secret TOKEN]\n" {
		t.Errorf("with another shim: %q", got)
	}
	// A restarted kernel has them before the first cell.
	if _, err := a.Restart(soon(t)); err != nil {
		t.Fatal(err)
	}
	if got := p.run("import os; print(os.environ['TOKEN'])"); got != "[secret TOKEN]\n" {
		t.Errorf("restarted: %q", got)
	}
	// Taken back.
	if put, err := a.SetSecrets(soon(t), Secrets{Old: now.Current}); err != nil || put != (Put{}) {
		t.Fatalf("put: %+v, %v", put, err)
	}
	if got := p.run("print('TOKEN' in os.environ, 'QUIET' in os.environ)"); got != "False False\n" {
		t.Errorf("taken back: %q", got)
	}
	if err := a.Stop(soon(t)); err != nil {
		t.Fatal(err)
	}
	nowhere(t, dir, first[:30], second, quiet)
}

// TestSecretsAreErased shows that a kernel's memory has none while it is quiesced, that
// they are back afterwards, and that a kernel that does not erase them is not quiesced.
func TestSecretsAreErased(t *testing.T) {
	dir, _ := newSpec(t, withModule(t))
	a, _ := spawn(t, dir)
	p := attach(t, a, "one")
	p.run("import os, time")
	value, wide := canary("plain"), canary("wide")+"ä€"
	if put, err := a.SetSecrets(soon(t), secretsOf("TOKEN", value, "WIDE", wide)); err != nil || put != (Put{}) {
		t.Fatalf("put: %+v, %v", put, err)
	}
	p.run("n = len(os.environ['TOKEN']) + len(os.environ['WIDE']), os.environ.get('TOKEN') is None")
	detail, err := a.Detail(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	if n := inMemory(t, detail.InitPID, value); n == 0 {
		t.Fatal("the search does not find what is there")
	}
	if _, err := a.Quiesce(soon(t), 10*time.Second); err != nil {
		t.Fatal(err)
	}
	for _, v := range []string{value, wide, wide[:30]} {
		if n := inMemory(t, detail.InitPID, v); n != 0 {
			t.Errorf("%d copies of a value are in the quiesced kernel's memory", n)
		}
	}
	if _, err := a.Resume(soon(t)); err != nil {
		t.Fatal(err)
	}
	if got, want := p.run("print(os.environ['TOKEN'], os.environ['WIDE'], n[0])"), fmt.Sprintf("[secret TOKEN] [secret WIDE] %d\n", len(value)+len([]rune(wide))); got != want {
		t.Errorf("after it: %q, want %q", got, want)
	}
	// In the middle of a cell, too.
	busy := p.execute("time.sleep(3); print(len(os.environ['TOKEN']))")
	p.until("busy", func(g got) bool { return g.parent == busy && g.kind == "execute_input" })
	if q, err := a.Quiesce(soon(t), 0); err != nil || !q.Busy {
		t.Fatalf("quiesced: %+v, %v", q, err)
	}
	if _, err := a.Resume(soon(t)); err != nil {
		t.Fatal(err)
	}
	if got, _ := p.result(busy); got != fmt.Sprintf("%d\n", len(value)) {
		t.Errorf("in the middle of a cell: %q", got)
	}
	// Whose module does not answer can't be saved, and goes on.
	p.run("handlers = get_ipython().kernel.control_handlers; handler = handlers.pop('postern_secrets_request')")
	if _, err := a.Quiesce(soon(t), time.Second); err == nil || !strings.Contains(err.Error(), "did not erase its secrets") {
		t.Errorf("quiesced: %v", err)
	}
	p.run("handlers['postern_secrets_request'] = handler")
	deadline := time.Now().Add(30 * time.Second)
	for got := ""; got != "True\n"; got = p.run("print('TOKEN' in os.environ)") {
		if time.Now().After(deadline) {
			t.Fatal("the kernel has not got its secrets again")
		}
	}
}

// TestSecretsAndForks shows that children that a kernel forks have no secrets, and that
// they are erased whatever the notebook does to os.environ.
func TestSecretsAndForks(t *testing.T) {
	dir, _ := newSpec(t, withModule(t))
	a, _ := spawn(t, dir)
	p := attach(t, a, "one")
	p.run("import os, time")
	value := canary("forked")
	if put, err := a.SetSecrets(soon(t), secretsOf("TOKEN", value)); err != nil || put != (Put{}) {
		t.Fatalf("put: %+v, %v", put, err)
	}
	p.run("n = len(os.environ['TOKEN'])")
	detail, err := a.Detail(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	if got := p.run(`r, w = os.pipe()
child = os.fork()
if child == 0:
    os.write(w, b'TOKEN' in os.environb and b'yes' or b'no')
    time.sleep(1000)
print(os.read(r, 9), 'TOKEN' in os.environ)
environ = os.environ
os.environ = {}`); got != "b'no' True\n" {
		t.Errorf("in a child: %q", got)
	}
	if _, err := a.Quiesce(soon(t), 10*time.Second); err != nil {
		t.Fatal(err)
	}
	if len(descendants(t, detail.InitPID)) < 3 {
		t.Error("the child has ended")
	}
	for _, v := range []string{value} {
		if n := inMemory(t, detail.InitPID, v); n != 0 {
			t.Errorf("%d copies of a value are in the memory of the quiesced kernel and its child", n)
		}
	}
	if _, err := a.Resume(soon(t)); err != nil {
		t.Fatal(err)
	}
	p.run("os.environ = environ; os.kill(child, 9); os.waitpid(child, 0)")
	if got := p.run("print(os.environ['TOKEN'])"); got != "[secret TOKEN]\n" {
		t.Errorf("afterwards: %q", got)
	}
}

// TestSecretsAreNotInImages looks for values in CRIU's images and all that goes with them,
// and restores the kernel from them.
func TestSecretsAreNotInImages(t *testing.T) {
	criutest.Path(t)
	dir, _ := newSpec(t, withModule(t))
	a, _ := spawn(t, dir)
	p := attach(t, a, "one")
	value, copied := canary("secret"), canary("copied")
	if _, err := a.SetSecrets(soon(t), secretsOf("TOKEN", value, "COPIED", copied)); err != nil {
		t.Fatal(err)
	}
	p.run("import os; n = len(os.environ['TOKEN']); mine = os.environ['COPIED']")
	d, o := dump(t, a, false)
	nowhere(t, o.Images, value)
	nowhere(t, o.Private, value)
	if bytes.Contains(d.Kernel, []byte(value)) || bytes.Contains(d.Kernel, []byte(copied)) {
		t.Error("what is saved beside the images has a value")
	}
	// The search finds what the notebook keeps.
	found := false
	pages, err := filepath.Glob(filepath.Join(o.Images, "pages-*.img"))
	if err != nil || len(pages) == 0 {
		t.Fatalf("no images: %v", err)
	}
	for _, path := range pages {
		text, err := os.ReadFile(path)
		found = found || err == nil && bytes.Contains(text, []byte(copied))
	}
	if !found {
		t.Error("what a variable holds is not in the images: is the search of any use?")
	}
	rotated := canary("rotated")
	all := secretsOf("TOKEN", rotated)
	all.Old = []Secret{{Name: "TOKEN", Value: []byte(value)}, {Name: "COPIED", Value: []byte(copied)}}
	if _, err := a.SetSecrets(soon(t), all); err != nil {
		t.Fatal(err)
	}
	if err := a.Restore(soon(t), RestoreOrder{Images: o.Images, Private: o.Private, Kernel: d.Kernel, Checkpoint: "ckp_s"}); err != nil {
		t.Fatal(err)
	}
	if got, want := p.run("print(len(os.environ['TOKEN']), os.environ['TOKEN'][-9:], 'COPIED' in os.environ, mine, n)"), fmt.Sprintf("%d %s False [secret COPIED] %d\n", len(rotated), rotated[len(rotated)-9:], len(value)); got != want {
		t.Errorf("after the restore: %q, want %q", got, want)
	}
}

// TestSecretsForADeadKernel shows that what is set while a kernel is dead is there when it
// is restarted, and that nothing stays in its directory.
func TestSecretsForADeadKernel(t *testing.T) {
	dir, _ := newSpec(t, withModule(t))
	a, _ := spawn(t, dir)
	p := attach(t, a, "one")
	p.execute("import os; os._exit(3)")
	waitState(t, a, posternv1.KernelState_KERNEL_STATE_DEAD)
	value := canary("dead")
	if put, err := a.SetSecrets(soon(t), secretsOf("TOKEN", value)); err != nil || !put.Later {
		t.Fatalf("put: %+v, %v", put, err)
	}
	if _, err := a.Restart(soon(t)); err != nil {
		t.Fatal(err)
	}
	if got := p.run("import os; print(os.environ['TOKEN'])"); got != "[secret TOKEN]\n" {
		t.Errorf("printed %q", got)
	}
	nowhere(t, dir, value)
	if _, err := os.Lstat(filepath.Join(dir, runDir, secretsSocket)); err == nil {
		t.Error("the socket for secrets is there still")
	}
}

// TestSecretsSocketIsTheKernels shows that the socket that values come by answers the
// kernel's user alone, and whoever else comes first does not take its place.
func TestSecretsSocketIsTheKernels(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to give a socket away")
	}
	dir := t.TempDir()
	uid := uint32(os.Geteuid()) // stands for the kernel's
	for name, test := range map[string]struct {
		uid  uint32
		want int
	}{"its user": {uid, 4 + 6 + len("TOKEN") + len("a value of it")}, "another": {1_970_000_001, 0}} {
		t.Run(name, func(t *testing.T) {
			listener, err := runsock.Listen(dir, secretsSocket, test.uid)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			done := make(chan struct{})
			go func() {
				defer close(done)
				(&link{}).hand(ctx, listener, test.uid, secretsOf("TOKEN", "a value of it").Current)
			}()
			conn, err := net.Dial("unix", filepath.Join(dir, secretsSocket))
			if err != nil {
				t.Fatal(err)
			}
			got, _ := io.ReadAll(conn)
			if len(got) != test.want {
				t.Errorf("%d bytes came, want %d", len(got), test.want)
			}
			conn.Close()
			listener.Close()
			<-done
		})
	}
}
