package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// postern builds the command once for a test and returns how to run it as a token.
func postern(t *testing.T, l *lab) func(args ...string) *exec.Cmd {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "postern")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, "../client/postern").CombinedOutput(); err != nil {
		t.Fatalf("build postern: %v\n%s", err, out)
	}
	home := t.TempDir()
	return func(args ...string) *exec.Cmd {
		cmd := exec.CommandContext(t.Context(), binary, args...)
		cmd.Env = append(os.Environ(), "HOME="+home, "XDG_CONFIG_HOME=", "JUPYTER_DATA_DIR="+filepath.Join(home, "jupyter"), "POSTERN_URL="+l.url, "POSTERN_TOKEN="+l.token)
		return cmd
	}
}

// outcome runs a command to its end.
func outcome(t *testing.T, cmd *exec.Cmd) (stdout, stderr string, code int) {
	t.Helper()
	var out, err bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &err
	var exit *exec.ExitError
	if rerr := cmd.Run(); errors.As(rerr, &exit) {
		code = exit.ExitCode()
	} else if rerr != nil {
		t.Fatal(rerr)
	}
	return out.String(), err.String(), code
}

func TestKernelCommand(t *testing.T) {
	l := newLab(t)
	run := postern(t, l)
	id, stderr, code := outcome(t, run("kernel", "start", "edge", "--spec", "python3"))
	if code != 0 || len(id) != 37 || stderr != "" {
		t.Fatalf("start: %q, %q, %d", id, stderr, code)
	}
	id = strings.TrimSpace(id)
	for _, test := range []struct {
		name           string
		args           []string
		stdin          string
		stdout, stderr string
		code           int
	}{
		{"prints", []string{"exec", id, "print hello\nvalue 42\nstderr careful"}, "", "hello\n42\n", "careful\n", 0},
		{"from stdin", []string{"exec", id, "-"}, "print a\nprint b\n", "a\nb\n", "", 0},
		{"fails", []string{"exec", id, "print x\nerror no luck"}, "", "x\n", "Traceback\nException: no luck\npostern: the cell failed: Exception: no luck\n", 1},
		{"image", []string{"exec", id, "image"}, "", "<Figure size 640x480>\n", "[image/png, 8 B: not shown here]\n", 0},
		{"asks", []string{"exec", id, "input"}, "Ana\n", "got Ana\n", "name? ", 0},
		{"asks nobody", []string{"exec", id, "input"}, "", "got \x04\n", "name? ", 0},
		{"JSON", []string{"exec", id, "print x", "-o", "json"}, "", "{\"content\":{\"name\":\"stdout\",\"text\":\"x\\n\"},\"metadata\":{},\"type\":\"stream\"}\n{\"content\":{\"execution_count\":7,\"payload\":[],\"status\":\"ok\",\"user_expressions\":{}},\"metadata\":{},\"type\":\"execute_reply\"}\n", "", 0},
		{"no such kernel", []string{"exec", "nope", "x"}, "", "", "postern: kernel \"nope\" not found\n", 4},
		{"another's spec", []string{"start", "edge", "--spec", "julia"}, "", "", "postern: the host offers no kernelspec \"julia\": it has python3\n", 1},
		{"no such agent", []string{"start", "nowhere"}, "", "", "postern: agent \"nowhere\" not found\n", 4},
		{"specs", []string{"specs", "edge"}, "", "NAME     LANGUAGE  DISPLAY NAME  DEFAULT\npython3  python    Simulated 3   yes\n", "", 0},
		{"interrupt", []string{"interrupt", id}, "", "kernel " + id + " was interrupted\n", "", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			cmd := run(append([]string{"kernel"}, test.args...)...)
			cmd.Stdin = strings.NewReader(test.stdin)
			stdout, stderr, code := outcome(t, cmd)
			if stdout != test.stdout || stderr != test.stderr || code != test.code {
				t.Errorf("got %q, %q, %d\nwant %q, %q, %d", stdout, stderr, code, test.stdout, test.stderr, test.code)
			}
		})
	}
	// The interrupt of the last test waits for the next cell.
	outcome(t, run("kernel", "exec", id, "sleep"))

	// Ctrl-C reaches the cell.
	cmd := run("kernel", "exec", id, "print asleep\nsleep")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = w
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	line := make([]byte, 7)
	if _, err := io.ReadFull(r, line); err != nil || string(line) != "asleep\n" {
		t.Fatalf("got %q, %v", line, err)
	}
	cmd.Process.Signal(syscall.SIGINT)
	err = cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(said.String(), "the cell failed: KeyboardInterrupt") {
		t.Errorf("after Ctrl-C: %v, %q", err, said.String())
	}
	r.Close()

	if stdout, _, code := outcome(t, run("kernel", "list", "-o", "json")); code != 0 || !strings.Contains(stdout, id) || !strings.Contains(stdout, `"tokenName": "ana"`) {
		t.Errorf("list: %d, %s", code, stdout)
	}
	if stdout, _, code := outcome(t, run("__complete", "kernel", "exec", "")); code != 0 || !strings.Contains(stdout, id+"\tedge python3 idle") {
		t.Errorf("completion: %d, %s", code, stdout)
	}
	if stdout, _, _ := outcome(t, run("__complete", "kernel", "start", "edge", "--spec", "")); !strings.Contains(stdout, "python3\tSimulated 3") {
		t.Errorf("completion of --spec: %s", stdout)
	}
	if _, _, code := outcome(t, run("kernel", "restart", id)); code != 0 {
		t.Errorf("restart: %d", code)
	}
	if stdout, _, code := outcome(t, run("kernel", "stop", id)); code != 0 || stdout != "kernel "+id+" is stopped\n" {
		t.Errorf("stop: %d, %s", code, stdout)
	}
	if _, _, code := outcome(t, run("kernel", "stop", id)); code != 4 {
		t.Errorf("stop once more: %d, want 4", code)
	}
	l.hub.Disconnect(l.agent.id, nil)
	for deadline := time.Now().Add(time.Minute); l.hub.Online() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the agent stays online")
		}
	}
	if _, stderr, code := outcome(t, run("kernel", "start", "edge")); code != 5 || strings.Count(stderr, "\n") != 1 {
		t.Errorf("start on an agent that is away: %d, %q", code, stderr)
	}
	if stdout, _, code := outcome(t, run("kernel", "list", "edge")); code != 0 || !strings.Contains(stdout, "agent offline") {
		t.Errorf("list of an agent that is away: %d, %s", code, stdout)
	}
}

// bridged talks to the bridge as Jupyter's own client does, over TCP and ipc.
const bridged = `
import os, sys, time, signal
from jupyter_client.manager import KernelManager
for transport in ("tcp", "ipc"):
    km = KernelManager(kernel_name="edge", transport=transport)
    km.start_kernel()
    kc = km.blocking_client()
    kc.start_channels()
    kc.wait_for_ready(timeout=30)
    out = []
    def hook(m):
        if m["msg_type"] == "stream": out.append(m["content"]["text"])
    r = kc.execute_interactive("print hello\nflood 3000 200", timeout=60, output_hook=hook)
    assert r["content"]["status"] == "ok", r
    text = "".join(out)
    assert text.startswith("hello\n"), text[:50]
    lines = text.split("\n")[1:-1]
    assert [l[:8] for l in lines] == ["%08d" % i for i in range(3000)], len(lines)
    kc.input = None
    asked = []
    r = kc.execute_interactive("input", timeout=30, allow_stdin=True, output_hook=hook, stdin_hook=lambda m: (asked.append(m["content"]["prompt"]), kc.input_reply if False else kc.input("x")) if False else kc.stdin_channel.send(kc.session.msg("input_reply", {"value": "Ana", "status": "ok"}, parent=m["header"])))
    assert out[-1] == "got Ana\n", out[-1]
    mid = kc.execute("sleep")
    while True:
        m = kc.get_iopub_msg(timeout=30)
        if m["msg_type"] == "execute_input" and m["parent_header"]["msg_id"] == mid: break
    km.interrupt_kernel()
    r = kc.get_shell_msg(timeout=30)
    assert r["content"]["status"] == "error" and r["content"]["ename"] == "KeyboardInterrupt", r
    assert km.is_alive()
    km.restart_kernel(now=False)
    kc.wait_for_ready(timeout=30)
    r = kc.execute_interactive("print again", timeout=60, output_hook=hook)
    assert r["content"]["execution_count"] in (1, 2) and out[-1] == "again\n", (r["content"], out[-1])
    kc.stop_channels()
    km.shutdown_kernel()
    assert not km.is_alive()
print("done")
`

func TestKernelBridge(t *testing.T) {
	if err := exec.CommandContext(t.Context(), "/usr/bin/python3", "-c", "import jupyter_client").Run(); err != nil {
		t.Fatal("the test needs Debian's python3-jupyter-client: run packaging/dev/deps.sh jupyter")
	}
	l := newLab(t)
	run := postern(t, l)
	before := len(l.host.Kernels())
	if _, stderr, code := outcome(t, run("kernel", "bridge", "--install", "edge", "--agent", "edge")); code != 0 || !strings.Contains(stderr, "kernel.json written") {
		t.Fatalf("install: %d, %s", code, stderr)
	}
	for _, args := range [][]string{{"--agent", "edge"}, {"-f", "x"}, {"--install", "../x", "--agent", "edge"}, {"--install", "a", "-f", "b", "--agent", "edge"}} {
		if _, _, code := outcome(t, run(append([]string{"kernel", "bridge"}, args...)...)); code != 2 {
			t.Errorf("bridge %q: exit code %d, want 2", args, code)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/usr/bin/python3", "-c", bridged)
	cmd.Env = run().Env
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "done") {
		t.Fatalf("%v\n%s", err, out)
	}
	if n := len(l.host.Kernels()); n != before {
		t.Errorf("%d kernels are left, want %d", n, before)
	}
}
