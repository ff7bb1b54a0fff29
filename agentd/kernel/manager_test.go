package kernel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/agentd/kernel/internal/shim"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

var lastBase atomic.Uint32

var ana = &posternv1.Principal{Organization: "org_1", TokenId: "tok_1", TokenName: "ana", Role: "analyst"}

// settings are those of a test: users of its own.
func settings() Settings {
	base := 1_970_000_000 + uint32(os.Getpid()%10_000)*1000 + 50*lastBase.Add(1)
	return Settings{Enabled: true, Max: 4, PIDs: 0, Network: "none", JournalBytes: 16 << 20, UIDBase: base, UIDs: 50}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for kernels' namespaces")
	}
}

// stateDir is a directory for kernels, cleaned of what a failed test leaves.
func stateDir(t *testing.T) string {
	t.Helper()
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "kernels")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		defer cancel()
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			path := filepath.Join(dir, e.Name())
			if t.Failed() {
				for _, name := range []string{"shim.log", "log"} {
					text, _ := os.ReadFile(filepath.Join(path, name))
					t.Logf("%s/%s:\n%.3000s", e.Name(), name, text)
				}
			}
			if err := shim.NewAgent(path).Stop(ctx); err != nil && !errors.Is(err, shim.ErrNoShim) {
				t.Logf("stop %s: %v", path, err)
			}
			if s, err := shim.ReadSpec(path); err == nil {
				if err := sandbox.Cleanup(ctx, s.Sandbox); err != nil {
					t.Errorf("clean up %s: %v", path, err)
				}
			}
		}
		// A shim that was told to stop is ours to reap.
		for {
			var status unix.WaitStatus
			if pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	})
	return dir
}

func open(t *testing.T, dir string, s Settings) *Manager {
	t.Helper()
	m := New(Config{Dir: dir, Logger: slog.New(slog.NewTextHandler(testWriter{t}, nil))})
	m.Set(s)
	if err := m.Open(soon(t)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", strings.TrimSpace(string(p)))
	return len(p), nil
}

func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func start(t *testing.T, m *Manager, id string) *posternv1.Kernel {
	t.Helper()
	k, err := m.Start(soon(t), Start{ID: id, Spec: "python3", Owner: ana})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// client is one of a kernel's channels.
type client struct {
	t      *testing.T
	stream io.ReadWriteCloser
	in     *kernelstream.Reader
	out    *kernelstream.Writer
}

func attach(t *testing.T, m *Manager, id string, resume bool) *client {
	t.Helper()
	stream, err := m.Channels(soon(t), &posternv1.KernelChannelsRequest{KernelId: id, Client: "c", Principal: ana, Resume: resume})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = stream.Close() })
	return &client{t, stream, kernelstream.NewReader(stream), kernelstream.NewWriter(stream)}
}

func (c *client) send(code string) string {
	c.t.Helper()
	m, err := jupyter.New(jupyter.Shell, "execute_request", "c", map[string]any{"code": code, "silent": false, "allow_stdin": false, "stop_on_error": false})
	if err != nil {
		c.t.Fatal(err)
	}
	if err := c.out.Message(m); err != nil {
		c.t.Fatal(err)
	}
	h, _ := jupyter.ParseHeader(m.Header)
	return h.ID
}

// run runs code and returns the contents of what it printed.
func (c *client) run(code string) string {
	c.t.Helper()
	return c.wait(c.send(code))
}

func (c *client) wait(id string) string {
	c.t.Helper()
	stop := time.AfterFunc(60*time.Second, func() { _ = c.stream.Close() })
	defer stop.Stop()
	var out strings.Builder
	for reply, idle := false, false; !reply || !idle; {
		f, err := c.in.Next()
		if err != nil {
			c.t.Fatalf("waiting for a result: %v, so far %q", err, out.String())
		}
		m := f.GetDelivery().GetMessage()
		if m == nil {
			continue
		}
		h, _ := jupyter.ParseHeader(m.Header)
		parent, _ := jupyter.ParseHeader(m.ParentHeader)
		if parent.ID != id {
			continue
		}
		switch {
		case h.Type == "stream" || h.Type == "execute_result" || h.Type == "error":
			out.Write(m.Content)
		case h.Type == "execute_reply":
			reply = true
		case h.Type == "status" && strings.Contains(string(m.Content), "idle"):
			idle = true
		}
	}
	return out.String()
}

func TestLife(t *testing.T) {
	dir, s := stateDir(t), settings()
	m := open(t, dir, s)
	specs := m.Specs()
	if specs.Default != "python3" || len(specs.Specs) == 0 || specs.Specs[0].Language != "python" || len(specs.Specs[0].Resources) == 0 {
		t.Errorf("specs are %v", specs)
	}
	id := jupyter.NewID()
	k := start(t, m, id)
	if k.Id != id || k.Spec != "python3" || k.Owner.GetTokenName() != "ana" || k.Generation != 1 {
		t.Errorf("kernel is %v", k)
	}
	if again := start(t, m, id); again.Generation != 1 {
		t.Errorf("the second start of one id: %v", again)
	}
	if _, err := m.Start(soon(t), Start{ID: id, Spec: "python3", Owner: &posternv1.Principal{TokenId: "tok_2"}}); proto.CodeOf(err) != proto.CodeAlreadyExists {
		t.Errorf("another's start of one id: %v", err)
	}
	c := attach(t, m, id, false)
	if got := c.run("import os; print(os.environ.get('REGION'), os.getcwd()); x = 1"); !strings.Contains(got, "None /home/kernel") {
		t.Errorf("printed %s", got)
	}
	busy := c.send("import time; time.sleep(1000)")
	for {
		k, err := m.Get(soon(t), id)
		if err != nil {
			t.Fatal(err)
		}
		if k.State == posternv1.KernelState_KERNEL_STATE_BUSY {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if _, err := m.Interrupt(soon(t), id); err != nil {
		t.Fatal(err)
	}
	if got := c.wait(busy); !strings.Contains(got, "KeyboardInterrupt") {
		t.Errorf("interrupted: %s", got)
	}
	if k, err := m.Restart(soon(t), id); err != nil || k.Generation != 2 {
		t.Errorf("restart: %v, %v", k, err)
	}
	if got := c.run("x"); !strings.Contains(got, "NameError") {
		t.Errorf("after a restart: %s", got)
	}
	if list := m.List(); len(list) != 1 || list[0].Id != id {
		t.Errorf("list is %v", list)
	}
	if err := m.Stop(soon(t), id); err != nil {
		t.Fatal(err)
	}
	entries, _ := os.ReadDir(dir)
	if len(entries) != 0 || len(m.List()) != 0 {
		t.Errorf("left: %v, %v", entries, m.List())
	}
	if n := processes(t, s); n != 0 {
		t.Errorf("%d processes are left", n)
	}
	for name, err := range map[string]error{
		"get": second(m.Get(soon(t), id)), "stop": m.Stop(soon(t), id), "interrupt": second(m.Interrupt(soon(t), id)),
		"attach": second(m.Channels(soon(t), &posternv1.KernelChannelsRequest{KernelId: id})),
	} {
		if proto.CodeOf(err) != proto.CodeNotFound {
			t.Errorf("%s after stop: %v", name, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// processes counts those of a test's users.
func processes(t *testing.T, s Settings) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		var st unix.Stat_t
		if e.Name()[0] >= '0' && e.Name()[0] <= '9' && unix.Stat("/proc/"+e.Name(), &st) == nil && st.Uid >= s.UIDBase && st.Uid < s.UIDBase+s.UIDs {
			n++
		}
	}
	return n
}

func TestRefusals(t *testing.T) {
	s := settings()
	s.Max = 1
	m := open(t, stateDir(t), s)
	for name, c := range map[string]struct {
		start Start
		want  proto.Code
	}{
		"no UUID": {Start{ID: "../../etc", Spec: "python3", Owner: ana}, proto.CodeInvalid},
		"no spec": {Start{ID: jupyter.NewID(), Spec: "cobol", Owner: ana}, proto.CodeNotFound},
	} {
		if _, err := m.Start(soon(t), c.start); proto.CodeOf(err) != c.want {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	id := jupyter.NewID()
	start(t, m, id)
	if _, err := m.Start(soon(t), Start{ID: jupyter.NewID(), Spec: "python3", Owner: ana}); proto.CodeOf(err) != proto.CodeOverloaded || !strings.Contains(err.Error(), "kernels.max") {
		t.Errorf("one too many: %v", err)
	}
	s.Enabled = false
	m.Set(s)
	if _, err := m.Start(soon(t), Start{ID: jupyter.NewID(), Spec: "python3", Owner: ana}); proto.CodeOf(err) != proto.CodePolicyDenied {
		t.Errorf("kernels are off: %v", err)
	}
	if got := m.Specs(); len(got.Specs) != 0 {
		t.Errorf("specs of a host without kernels: %v", got)
	}
	if err := m.Stop(soon(t), id); err != nil {
		t.Error(err)
	}
}

// A kernel that cannot start leaves nothing.
func TestStartFails(t *testing.T) {
	needRoot(t)
	// What is in /tmp no kernel can see: it has its own.
	specs, err := os.MkdirTemp("/srv", "postern-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(specs) })
	for name, text := range map[string]string{
		"gone":   `{"argv":["/no/such/program","{connection_file}"],"display_name":"Gone","language":"x"}`,
		"noargv": `{"argv":[],"display_name":"x","language":"x"}`,
		"broken": `{`,
	} {
		if err := os.MkdirAll(filepath.Join(specs, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(specs, name, "kernel.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	dir, s := stateDir(t), settings()
	s.SpecDirs = []string{specs}
	m := open(t, dir, s)
	if got := m.Specs(); len(got.Specs) != 1 || got.Specs[0].Name != "gone" {
		t.Errorf("specs are %v", got)
	}
	_, err = m.Start(soon(t), Start{ID: jupyter.NewID(), Spec: "gone", Owner: ana})
	if err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("a program that is not there: %v", err)
	}
	if _, err := m.Start(soon(t), Start{ID: jupyter.NewID(), Spec: "noargv", Owner: ana}); proto.CodeOf(err) != proto.CodeNotFound || !strings.Contains(err.Error(), "argv") {
		t.Errorf("a spec without argv: %v", err)
	}
	own := t.TempDir()
	if err := os.CopyFS(own, os.DirFS(specs)); err != nil {
		t.Fatal(err)
	}
	s.SpecDirs = []string{own}
	m.Set(s)
	if _, err := m.Start(soon(t), Start{ID: jupyter.NewID(), Spec: "gone", Owner: ana}); proto.CodeOf(err) != proto.CodeInvalid || !strings.Contains(err.Error(), "cannot run here") {
		t.Errorf("a spec in /tmp: %v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 || len(m.List()) != 0 {
		t.Errorf("left: %v", entries)
	}
}

// Kernels outlive a manager; the next one adopts them, and ends what was half done.
func TestAdopt(t *testing.T) {
	dir, s := stateDir(t), settings()
	m := open(t, dir, s)
	id, ending := jupyter.NewID(), jupyter.NewID()
	start(t, m, id)
	start(t, m, ending)
	c := attach(t, m, id, false)
	c.run("x = 'kept'")
	busy := c.send("import time\ntime.sleep(0.5)\nprint('printed while agentd was away')")
	_ = c.stream.Close()
	m.Close()
	// Agentd died when it was stopping one, and when it was making another.
	if err := os.WriteFile(filepath.Join(dir, ending, stopMark), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, jupyter.NewID()), 0o700); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	m = open(t, dir, s)
	if list := m.List(); len(list) != 1 || list[0].Id != id {
		t.Fatalf("adopted %v", list)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("directories: %v", entries)
	}
	c = attach(t, m, id, true)
	if got := c.wait(busy); !strings.Contains(got, "printed while agentd was away") {
		t.Errorf("missed: %s", got)
	}
	if got := c.run("print(x)"); !strings.Contains(got, "kept") {
		t.Errorf("printed %s", got)
	}
	k, err := m.Get(soon(t), id)
	if err != nil || k.Owner.GetTokenName() != "ana" || k.Generation != 1 {
		t.Errorf("kernel is %v, %v", k, err)
	}
	if err := m.Stop(soon(t), id); err != nil {
		t.Fatal(err)
	}
	if n := processes(t, s); n != 0 {
		t.Errorf("%d processes are left", n)
	}
}

// A shim that is killed is replaced, and the kernel does not notice.
func TestShimReplaced(t *testing.T) {
	m := open(t, stateDir(t), settings())
	id := jupyter.NewID()
	start(t, m, id)
	c := attach(t, m, id, false)
	c.run("x = 'kept'")
	m.mu.Lock()
	agent := m.kernels[id].agent
	m.mu.Unlock()
	before, err := agent.Detail(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(before.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if d, err := agent.Detail(soon(t)); err == nil && d.PID != before.PID {
			if d.InitPID != before.InitPID {
				t.Errorf("another kernel: %+v, was %+v", d, before)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no other shim")
		}
	}
	c = attach(t, m, id, true)
	if got := c.run("print(x)"); !strings.Contains(got, "kept") {
		t.Errorf("printed %s", got)
	}
	if err := m.Stop(soon(t), id); err != nil {
		t.Fatal(err)
	}
}

// A kernel of the pool is there at once; another takes its place in the pool.
func TestPool(t *testing.T) {
	dir, s := stateDir(t), settings()
	s.Warm = 1
	m := open(t, dir, s)
	waiting := func() {
		t.Helper()
		for deadline := time.Now().Add(60 * time.Second); m.Waiting() < 1; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the pool stays empty")
			}
		}
	}
	waiting()
	if list := m.List(); len(list) != 0 {
		t.Errorf("the pool is listed: %v", list)
	}
	id := jupyter.NewID()
	began := time.Now()
	k := start(t, m, id)
	c := attach(t, m, id, false)
	if got := c.run("print(6*7)"); !strings.Contains(got, "42") {
		t.Errorf("printed %s", got)
	}
	t.Logf("first result after %v", time.Since(began))
	if k.State != posternv1.KernelState_KERNEL_STATE_IDLE || k.Id != id || k.Owner.GetTokenName() != "ana" {
		t.Errorf("kernel is %v", k)
	}
	waiting()
	// With an environment it is made anew.
	other := jupyter.NewID()
	if _, err := m.Start(soon(t), Start{ID: other, Spec: "python3", Owner: ana, Environment: map[string]string{"REGION": "eu"}}); err != nil {
		t.Fatal(err)
	}
	d := attach(t, m, other, false)
	if got := d.run("import os; print(os.environ['REGION'])"); !strings.Contains(got, "eu") {
		t.Errorf("printed %s", got)
	}
	// Taken ones outlive the manager; those that wait are made anew.
	_ = c.stream.Close()
	m.Close()
	m = open(t, dir, s)
	if list := m.List(); len(list) != 2 {
		t.Errorf("adopted %v", list)
	}
	waiting()
	s.Warm = 0
	m.Set(s)
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if entries, _ := os.ReadDir(dir); len(entries) == 2 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the pool is not emptied")
		}
	}
	for _, id := range []string{id, other} {
		if err := m.Stop(soon(t), id); err != nil {
			t.Error(err)
		}
	}
	if n := processes(t, s); n != 0 {
		t.Errorf("%d processes are left", n)
	}
}

func TestIdle(t *testing.T) {
	dir, s := stateDir(t), settings()
	s.IdleAfter = time.Hour
	m := New(Config{Dir: dir})
	m.Set(s)
	stopped := make(chan string, 4)
	m.OnIdleStop(func(k *posternv1.Kernel, reason string) { stopped <- k.Id + ": " + reason })
	if err := m.Open(soon(t)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	used, idle := jupyter.NewID(), jupyter.NewID()
	start(t, m, used)
	start(t, m, idle)
	c, d := attach(t, m, used, false), attach(t, m, idle, false)
	c.run("1")
	d.run("1")
	_ = d.stream.Close()
	for {
		if k, err := m.Get(soon(t), idle); err != nil || k.Connections == 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	m.endIdle(time.Now().Add(30 * time.Minute))
	if len(m.List()) != 2 {
		t.Fatal("stopped before its time")
	}
	for deadline := time.Now().Add(time.Minute); len(stopped) == 0 && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		m.endIdle(time.Now().Add(2 * time.Hour)) // when the manager has heard that nobody uses it
	}
	if list := m.List(); len(list) != 1 || list[0].Id != used {
		t.Errorf("left: %v", list)
	}
	if len(stopped) == 0 {
		t.Fatal("the idle one goes on")
	}
	if got := <-stopped; !strings.HasPrefix(got, idle+": nobody used it for 1h") {
		t.Errorf("told %q", got)
	}
	if err := m.Stop(soon(t), used); err != nil {
		t.Error(err)
	}
}

func TestIdleKernelsAreSuspended(t *testing.T) {
	dir, s := stateDir(t), settings()
	s.IdleAfter, s.IdleSuspend = time.Hour, true
	m := New(Config{Dir: dir})
	m.Set(s)
	var asked, told []string
	refuse := true
	m.OnIdleSuspend(func(_ context.Context, k *posternv1.Kernel) error {
		asked = append(asked, k.Id)
		if refuse {
			return errors.New("a GPU is open")
		}
		return nil
	}, func(k *posternv1.Kernel, reason string) { told = append(told, k.Id+" "+reason) })
	if err := m.Open(soon(t)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	id := jupyter.NewID()
	start(t, m, id)
	c := attach(t, m, id, false)
	c.run("1")
	_ = c.stream.Close()
	late := time.Now().Add(2 * time.Hour)
	for len(asked) == 0 { // the manager hears of what the kernel did
		m.endIdle(late)
		time.Sleep(20 * time.Millisecond)
	}
	m.endIdle(late)
	if len(asked) != 1 || len(told) != 0 {
		t.Errorf("asked %v, told %v: one that can't be suspended is asked again at once", asked, told)
	}
	if len(m.List()) != 1 {
		t.Fatal("a kernel that can't be suspended is gone")
	}
	refuse, m.refused = false, nil
	m.endIdle(late)
	if len(asked) != 2 || len(told) != 1 || !strings.HasPrefix(told[0], id+" nobody used it for 1h") {
		t.Errorf("asked %v, told %v", asked, told)
	}
	if err := m.Stop(soon(t), id); err != nil {
		t.Error(err)
	}
}

func TestSpecs(t *testing.T) {
	one, two := t.TempDir(), t.TempDir()
	write := func(dir, name, file, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	good := `{"argv":["/srv/venv/bin/python","-m","ipykernel_launcher","-f","{connection_file}","{resource_dir}"],"display_name":"P","language":"python","env":{"SECRET":"x"},"metadata":{"debugger":true}%s}`
	write(one, "Py", "kernel.json", fmt.Sprintf(good, ""))
	write(one, "Py", "logo-64x64.png", "png")
	write(one, "Py", "large.bin", strings.Repeat("x", maxResource+1))
	write(two, "py", "kernel.json", fmt.Sprintf(good, `,"interrupt_mode":"message"`))
	write(two, "msg", "kernel.json", fmt.Sprintf(good, `,"interrupt_mode":"message"`))
	write(two, "bad", "kernel.json", fmt.Sprintf(good, `,"interrupt_mode":"shout"`))
	write(two, "bad name", "kernel.json", fmt.Sprintf(good, ""))
	write(two, "large", "kernel.json", strings.Repeat(" ", maxSpecFile+1))
	write(two, "empty", "readme", "")
	found, wrong := findSpecs([]string{one, "/no/such/dir", two})
	if len(found) != 2 || found[0].name != "msg" || found[1].name != "py" || found[1].file.InterruptMode != "signal" || len(wrong) != 2 {
		t.Fatalf("found %+v, wrong %v", found, wrong)
	}
	if got := strings.Join(found[1].argv(), " "); got != "/srv/venv/bin/python -m ipykernel_launcher -f /run/postern/connection.json "+filepath.Join(one, "Py")+" --HistoryManager.hist_file=:memory:" {
		t.Errorf("argv is %s", got)
	}
	p := found[1].proto()
	if p.DisplayName != "P" || len(p.Resources) != 1 || string(p.Resources["logo-64x64.png"]) != "png" || strings.Contains(p.MetadataJson, "SECRET") || !strings.Contains(p.MetadataJson, "debugger") {
		t.Errorf("told %v", p)
	}
	venv := t.TempDir()
	write(venv, ".", "pyvenv.cfg", "")
	if got := environmentOf(filepath.Join(venv, "bin/python")); got != venv {
		t.Errorf("the environment of a venv's python is %q", got)
	}
	if got := environmentOf("/root/bin/python"); got != "" {
		t.Errorf("the environment of a stray python is %q", got)
	}
}
