package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const python = "/usr/bin/python3"

var lastUID atomic.Uint32

// newSpec is a directory with the spec of an ipykernel.
func newSpec(t *testing.T, change ...func(*Spec)) (dir string, spec Spec) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for a kernel's namespaces")
	}
	dir = t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	id := jupyter.NewID()
	uid := 1_960_000_000 + uint32(os.Getpid()%10_000)*1000 + lastUID.Add(1)
	spec = Spec{
		ID: id, Name: "python3", Language: "python", InterruptMode: "signal", JournalBytes: 64 << 20, Created: time.Now(),
		Sandbox: sandbox.Spec{
			ID: id, UID: uid, GID: uid, Network: sandbox.Network{Mode: sandbox.NetworkNone},
			Argv: []string{python, "-m", "ipykernel_launcher", "-f", ConnectionInside, "--HistoryManager.hist_file=:memory:"},
		},
	}
	spec.Places(dir)
	for _, c := range change {
		c(&spec)
	}
	if err := WriteSpec(dir, spec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := sandbox.Cleanup(ctx, spec.Sandbox); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			for _, name := range []string{logFile, kernelLog} {
				text, _ := os.ReadFile(filepath.Join(dir, name))
				t.Logf("%s:\n%s", name, text)
			}
		}
	})
	return dir, spec
}

func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// spawn starts a shim's process.
func spawn(t *testing.T, dir string) (*Agent, *os.Process) {
	t.Helper()
	p, err := Spawn(soon(t), "/proc/self/exe", dir)
	if err != nil {
		t.Fatal(err)
	}
	a := NewAgent(dir)
	t.Cleanup(func() {
		if t.Failed() {
			d, err := a.Detail(soon(t))
			k, _ := a.Kernel(soon(t))
			t.Logf("detail %+v, %v; kernel %v", d, err, k)
		}
		err := a.Stop(soon(t))
		if err != nil && !errors.Is(err, ErrNoShim) {
			t.Logf("stop: %v", err)
			_ = p.Kill()
		}
		_, _ = p.Wait()
	})
	return a, p
}

// waitState waits until the kernel is in a state.
func waitState(t *testing.T, a *Agent, want posternv1.KernelState) *posternv1.Kernel {
	t.Helper()
	ctx, cancel := context.WithCancel(soon(t))
	defer cancel()
	var last *posternv1.Kernel
	err := a.Watch(ctx, func(k *posternv1.Kernel) {
		last = k
		if k.State == want {
			cancel()
		}
	})
	if last == nil || last.State != want {
		t.Fatalf("the kernel is %v, not %v: %v", last, want, err)
	}
	return last
}

// peer is a Jupyter client at the shim's socket.
type peer struct {
	t      *testing.T
	name   string
	stream io.ReadWriteCloser
	in     *kernelstream.Reader
	out    *kernelstream.Writer
	// last is the sequence number of the newest delivery.
	last uint64
	at   *posternv1.Kernel
	// taken is what the shim said of our messages.
	taken uint64
}

func attach(t *testing.T, a *Agent, name string, change ...func(*posternv1.KernelChannelsRequest)) *peer {
	t.Helper()
	r := &posternv1.KernelChannelsRequest{KernelId: "k", Client: name}
	for _, c := range change {
		c(r)
	}
	stream, err := kernelstream.Dial(soon(t), a, r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = stream.Close() })
	p := &peer{t: t, name: name, stream: stream, in: kernelstream.NewReader(stream), out: kernelstream.NewWriter(stream)}
	f, err := p.in.Next()
	if err != nil || f.GetAttached() == nil {
		t.Fatalf("the first frame is %v, %v", f, err)
	}
	p.at = f.GetAttached()
	return p
}

func resume(r *posternv1.KernelChannelsRequest) { r.Resume = true }

// send sends a request and returns its id.
func (p *peer) send(channel, kind string, content any) string {
	p.t.Helper()
	m, err := jupyter.New(channel, kind, p.name, content)
	if err != nil {
		p.t.Fatal(err)
	}
	if err := p.out.Message(m); err != nil {
		p.t.Fatal(err)
	}
	h, _ := jupyter.ParseHeader(m.Header)
	return h.ID
}

func (p *peer) execute(code string) string {
	p.t.Helper()
	return p.send(jupyter.Shell, "execute_request", map[string]any{
		"code": code, "silent": false, "store_history": true, "user_expressions": map[string]string{}, "allow_stdin": true, "stop_on_error": false,
	})
}

// got is a delivery in short.
type got struct {
	sequence uint64
	channel  string
	kind     string
	parent   string
	replayed bool
	gap      uint64
	content  map[string]any
}

func (g got) String() string {
	return fmt.Sprintf("%d %s %s of %.8s %.300s", g.sequence, g.channel, g.kind, g.parent, fmt.Sprint(g.content))
}

// next is the next delivery.
func (p *peer) next() (got, error) {
	for {
		f, err := p.in.Next()
		if err != nil {
			return got{}, err
		}
		if f.GetChanged() != nil {
			p.at = f.GetChanged()
			continue
		}
		if f.GetTaken() > 0 {
			if f.GetTaken() <= p.taken {
				p.t.Errorf("taken %d after %d", f.GetTaken(), p.taken)
			}
			p.taken = f.GetTaken()
			continue
		}
		d := f.GetDelivery()
		if d == nil {
			return got{}, fmt.Errorf("frame %v", f)
		}
		g := got{sequence: d.Sequence, replayed: d.Replayed, gap: d.TruncatedFrom}
		if d.Sequence <= p.last {
			p.t.Errorf("delivery %d after %d", d.Sequence, p.last)
		}
		p.last = d.Sequence
		if m := d.Message; m != nil {
			h, err := jupyter.ParseHeader(m.Header)
			if err != nil {
				return g, err
			}
			parent, err := jupyter.ParseHeader(m.ParentHeader)
			if err != nil {
				return g, err
			}
			g.channel, g.kind, g.parent = m.Channel, h.Type, parent.ID
			if len(m.Content) < 1<<20 {
				if err := json.Unmarshal(m.Content, &g.content); err != nil {
					return g, err
				}
			} else {
				g.content = map[string]any{"text": string(m.Content)}
			}
		}
		return g, nil
	}
}

// until reads until a delivery fits, and returns all.
func (p *peer) until(what string, fits func(got) bool) []got {
	p.t.Helper()
	var all []got
	stop := time.AfterFunc(150*time.Second, func() { _ = p.stream.Close() })
	defer stop.Stop()
	for {
		g, err := p.next()
		if err != nil {
			p.t.Fatalf("waiting for %s: %v; got %.2000s", what, err, fmt.Sprint(all))
		}
		all = append(all, g)
		if fits(g) {
			return all
		}
	}
}

// finished tells the delivery with which a request is done: reply and idle come in any
// order.
func finished(id string) func(got) bool {
	var reply, idle bool
	return func(g got) bool {
		reply = reply || g.parent == id && g.channel == jupyter.Shell
		idle = idle || g.parent == id && g.kind == "status" && g.content["execution_state"] == "idle"
		return reply && idle
	}
}

// result reads until a request is done, with reply and idle, and returns what it
// printed and the reply.
func (p *peer) result(id string) (string, got) {
	p.t.Helper()
	var reply got
	var text strings.Builder
	idle := false
	p.until("the result of "+id, func(g got) bool {
		if g.parent != id {
			return false
		}
		switch {
		case g.channel == jupyter.IOPub && g.kind == "stream":
			text.WriteString(g.content["text"].(string))
		case g.channel == jupyter.IOPub && g.kind == "execute_result":
			text.WriteString(g.content["data"].(map[string]any)["text/plain"].(string))
		case g.channel == jupyter.IOPub && g.kind == "status" && g.content["execution_state"] == "idle":
			idle = true
		case g.channel == jupyter.Shell:
			reply = g
		}
		return idle && reply.kind != ""
	})
	return text.String(), reply
}

// run executes code and returns what it printed.
func (p *peer) run(code string) string {
	p.t.Helper()
	out, reply := p.result(p.execute(code))
	if reply.content["status"] != "ok" {
		p.t.Fatalf("%s: %v", code, reply)
	}
	return out
}
