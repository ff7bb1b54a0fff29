package restoretest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/checkpoint"
	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/proto"
)

// kernels are real kernels for an Engine, without shims: this process does what shims do.
type kernels struct {
	t      *testing.T
	driver *checkpoint.Driver

	mu    sync.Mutex
	all   map[string]*kernel
	state map[string]*state
}

type state struct {
	suspended  bool
	checkpoint string
	started    time.Time
}

var _ checkpoint.Kernels = (*kernels)(nil)

func (h *kernels) get(id string) (*kernel, *state, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	k := h.all[id]
	if k == nil {
		return nil, nil, proto.Errorf(proto.CodeNotFound, "no kernel %s", id)
	}
	return k, h.state[id], nil
}

func (h *kernels) add(k *kernel, checkpoint string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all[k.spec.ID] = k
	h.state[k.spec.ID] = &state{checkpoint: checkpoint, started: time.Now()}
}

func (h *kernels) Look(_ context.Context, id string) (checkpoint.Kernel, error) {
	k, s, err := h.get(id)
	if err != nil {
		return checkpoint.Kernel{}, err
	}
	out := checkpoint.Kernel{
		ID: id, Organization: "org", Running: k.box != nil, Suspended: s.suspended, Checkpoint: s.checkpoint, Started: s.started,
		PrivateDir: k.spec.PrivateDir, UID: k.spec.UID, GID: k.spec.GID, Attachments: map[string]string{},
	}
	if k.box != nil {
		out.InitPID = k.box.PID()
	}
	for i, b := range k.spec.Binds {
		out.Attachments[fmt.Sprintf("bind-%d", i)] = b.Source
	}
	return out, nil
}

func (h *kernels) Dump(ctx context.Context, id string, o checkpoint.DumpOrder) (checkpoint.Dumped, error) {
	k, _, err := h.get(id)
	if err != nil {
		return checkpoint.Dumped{}, err
	}
	after := checkpoint.GoOn
	if o.Stay {
		after = checkpoint.Stay
	}
	f, err := h.driver.Dump(ctx, k.tree(), o.Images, after, checkpoint.CopyDir{From: k.spec.PrivateDir, To: o.Private, Max: o.MaxPrivate})
	if err != nil {
		return checkpoint.Dumped{}, err
	}
	text, err := json.Marshal(k.spec)
	return checkpoint.Dumped{Kernel: text, Standstill: f.Standstill}, err
}

func (h *kernels) GoOn(_ context.Context, id string) error {
	k, _, err := h.get(id)
	if err == nil && k.box != nil {
		h.driver.Continue(k.box.PID())
	}
	return err
}

func (h *kernels) Suspend(_ context.Context, id, ckpt string) error {
	k, s, err := h.get(id)
	if err != nil {
		return err
	}
	k.stop()
	s.suspended, s.checkpoint = true, ckpt
	return nil
}

func (h *kernels) Restore(ctx context.Context, id string, o checkpoint.RestoreOrder) error {
	k, s, err := h.get(id)
	if err != nil {
		return err
	}
	k.stop()
	if o.Private != "" {
		old := k.spec.PrivateDir + ".old"
		if err := errors.Join(os.Rename(k.spec.PrivateDir, old), os.Rename(o.Private, k.spec.PrivateDir), os.RemoveAll(old)); err != nil {
			return err
		}
	}
	if err := h.up(ctx, k, o.Images); err != nil {
		return err
	}
	s.suspended, s.checkpoint, s.started = false, o.Checkpoint, time.Now()
	return nil
}

func (h *kernels) up(ctx context.Context, k *kernel, images string) error {
	p, err := sandbox.Prepare(k.spec)
	if err != nil {
		return err
	}
	pid, _, err := h.driver.Restore(ctx, tree(p.CRIU()), images)
	if err != nil {
		p.Abort()
		return err
	}
	k.box, err = p.Adopt(ctx, pid)
	return err
}

func (h *kernels) Fork(ctx context.Context, id, from string, o checkpoint.RestoreOrder, place func(uid, gid uint32, privateDir string) error) error {
	var spec sandbox.Spec
	if err := json.Unmarshal(o.Kernel, &spec); err != nil {
		return err
	}
	k := newKernel(h.t)
	own := k.spec
	k.spec = spec
	k.spec.ID, k.spec.UID, k.spec.GID, k.spec.StateDir, k.spec.RunDir, k.spec.PrivateDir, k.spec.LogFile = id, own.UID, own.GID, own.StateDir, own.RunDir, own.PrivateDir, own.LogFile
	if err := place(k.spec.UID, k.spec.GID, o.Private); err != nil {
		return err
	}
	if err := os.Rename(o.Private, k.spec.PrivateDir); err != nil {
		return err
	}
	k.writeConnection()
	if err := h.up(ctx, k, o.Images); err != nil {
		return err
	}
	h.add(k, o.Checkpoint)
	return nil
}

func newEngine(t *testing.T, dir string) (*checkpoint.Engine, *kernels) {
	t.Helper()
	h := &kernels{t: t, driver: driver(t), all: map[string]*kernel{}, state: map[string]*state{}}
	return openEngine(t, dir, h), h
}

func openEngine(t *testing.T, dir string, h *kernels) *checkpoint.Engine {
	t.Helper()
	e, err := checkpoint.Open(checkpoint.Config{State: dir, Kernels: h, Driver: h.driver, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

func TestRollbackTenTimesAndForksSideBySide(t *testing.T) {
	e, h := newEngine(t, t.TempDir())
	k := startKernel(t)
	h.add(k, "")
	k.want(setup, "set up")
	k.want(check, "1")
	first, err := e.Save(t.Context(), "org", k.spec.ID, checkpoint.Label{Label: "first"})
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		k.want(check, "2") // it changes memory and a file each time
		if err := e.Rollback(t.Context(), "org", k.spec.ID, string(first.ID)); err != nil {
			t.Fatal(err)
		}
	}
	k.want(check, "2")
	second, err := e.Save(t.Context(), "org", k.spec.ID, checkpoint.Label{})
	if err != nil {
		t.Fatal(err)
	}
	if second.Parent != first.ID {
		t.Errorf("the second checkpoint's parent is %q, want %q", second.Parent, first.ID)
	}
	if ratio := float64(second.Written) / float64(second.Size); ratio > 0.10 {
		t.Errorf("the second checkpoint takes %d of %d bytes", second.Written, second.Size)
	}
	var forks []*kernel
	var last string
	for i := range 5 {
		id := fmt.Sprintf("fork-%d-%d", os.Getpid(), i)
		from := string(first.ID)
		if i == 4 {
			from = "" // as it is now
		}
		if last, err = e.Fork(t.Context(), "org", k.spec.ID, from, id); err != nil {
			t.Fatal(err)
		}
		f, _, _ := h.get(id)
		forks = append(forks, f)
	}
	uids := map[string]bool{}
	for i, f := range forks {
		want := "2"
		if i == 4 {
			want = "3"
		}
		f.want(check, want)
		f.want(check, string(want[0]+1))
		uids[f.run("print(os.getuid(), os.stat('/dev/shm/s').st_uid == os.getuid(), os.stat(os.path.expanduser('~/notes')).st_uid == os.getuid(), open('/proc/self/status').read().count('CapEff:\t0000000000000000'))")] = true
	}
	if len(uids) != 5 {
		t.Errorf("the forks' users: %v", uids)
	}
	for text := range uids {
		if !strings.HasSuffix(text, "True True 1") {
			t.Errorf("a fork's user does not own its files, or has capabilities: %s", text)
		}
	}
	k.want(check, "3") // the forks did nothing to it
	// Its images are in memory still, and its fork's change of owner did nothing to them.
	if err := e.Rollback(t.Context(), "org", k.spec.ID, last); err != nil {
		t.Fatal(err)
	}
	k.want(check, "3")
	if list, damaged := e.List("org", k.spec.ID); len(list) != 3 || len(damaged) != 0 {
		t.Errorf("%d checkpoints, %v damaged", len(list), damaged)
	}
	if _, err := e.Save(t.Context(), "other", k.spec.ID, checkpoint.Label{}); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("another organization's checkpoint: %v", err)
	}
	if err := e.Rollback(t.Context(), "other", k.spec.ID, string(first.ID)); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("another organization's rollback: %v", err)
	}
}

func TestSuspendAndResumeAcrossAReopenedStore(t *testing.T) {
	dir := t.TempDir()
	e, h := newEngine(t, dir)
	k := startKernel(t)
	h.add(k, "")
	k.want(setup, "set up")
	s, err := e.Suspend(t.Context(), "org", k.spec.ID)
	if err != nil {
		t.Fatal(err)
	}
	if k.box != nil {
		t.Fatal("it runs still")
	}
	if err := e.Delete(t.Context(), "org", string(s.ID)); proto.CodeOf(err) != proto.CodeInvalid {
		t.Errorf("the only copy of a suspended kernel could be deleted: %v", err)
	}
	if _, err := e.Save(t.Context(), "org", k.spec.ID, checkpoint.Label{}); proto.CodeOf(err) != proto.CodeInvalid {
		t.Errorf("a suspended kernel was saved: %v", err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	e = openEngine(t, dir, h)
	if err := e.Resume(t.Context(), "org", k.spec.ID); err != nil {
		t.Fatal(err)
	}
	k.want(check, "1")
}

func TestRefusalsNameWhatStandsInTheWay(t *testing.T) {
	e, h := newEngine(t, t.TempDir())
	k := newKernel(t)
	shared := t.TempDir()
	if err := os.Chmod(shared, 0o777); err != nil {
		t.Fatal(err)
	}
	k.spec.Binds = []sandbox.Bind{{Source: shared, Target: "/work/data"}}
	k.writeConnection()
	box, err := sandbox.Start(t.Context(), k.spec)
	if err != nil {
		t.Fatal(err)
	}
	k.box, k.spec = box, box.Spec()
	h.add(k, "")
	k.want("f = open('/work/data/table.csv', 'w+'); f.write('1,2'); f.flush(); print('ok')", "ok")
	if found, err := e.Check(t.Context(), "org", k.spec.ID); err != nil || len(found) != 0 {
		t.Fatalf("%v, %v", found, err)
	}
	c, err := e.Save(t.Context(), "org", k.spec.ID, checkpoint.Label{})
	if err != nil {
		t.Fatal(err)
	}
	k.want("f.write(',3'); f.flush(); print('ok')", "ok")
	err = e.Rollback(t.Context(), "org", k.spec.ID, string(c.ID))
	if err == nil || !strings.Contains(err.Error(), "/work/data/table.csv has 5 bytes and had 3") {
		t.Fatalf("got %v", err)
	}
	k.want("f.write(',4'); f.flush(); print('still here')", "still here")
	if err := os.WriteFile(filepath.Join(shared, "table.csv"), []byte("9,9"), 0); err != nil {
		t.Fatal(err)
	}
	if err := e.Rollback(t.Context(), "org", k.spec.ID, string(c.ID)); err != nil {
		t.Fatal(err)
	}
	k.want("f.seek(0); print(f.read())", "9,9")
}

func TestAFullDiskWhileSuspendingLeavesTheKernelRunning(t *testing.T) {
	e, h := newEngine(t, t.TempDir())
	_ = e.Close()
	limited, err := checkpoint.Open(checkpoint.Config{State: t.TempDir(), Kernels: h, Driver: h.driver, Logger: slog.New(slog.DiscardHandler), MaxBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer limited.Close()
	k := startKernel(t)
	h.add(k, "")
	k.want(setup, "set up")
	if _, err := limited.Suspend(t.Context(), "org", k.spec.ID); proto.CodeOf(err) != proto.CodeStorageFull {
		t.Fatalf("got %v", err)
	}
	k.want(check, "1")
	if list, _ := limited.List("org", ""); len(list) != 0 {
		t.Errorf("%d checkpoints", len(list))
	}
}

// Shared memory, semaphores and message queues of System V go along into a fork, with what
// is in them, and are its user's.
func TestForkWithSystemVSharedMemory(t *testing.T) {
	e, h := newEngine(t, t.TempDir())
	k := startKernel(t)
	h.add(k, "")
	k.want(`
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True); libc.shmat.restype = ctypes.c_void_p
shm = libc.shmget(0x1234, 8192, 0o1600); at = libc.shmat(shm, None, 0)
ctypes.memmove(at, b"shared", 6)
sem = libc.semget(0x4321, 3, 0o1600); libc.semctl(sem, 1, 16, 7)
class Message(ctypes.Structure): _fields_ = [("kind", ctypes.c_long), ("text", ctypes.c_char * 4096)]
queue, other = libc.msgget(0x5678, 0o1600), libc.msgget(0x5679, 0o1600)
def send(kind, text): m = Message(kind, text); assert libc.msgsnd(queue, ctypes.byref(m), len(text), 0) == 0
def take():
    m = Message(); n = libc.msgrcv(queue, ctypes.byref(m), 4096, 0, 0o4000)
    return None if n < 0 else (m.kind, m.text[:n].decode())
for n in (0, 1, 7, 8, 9, 4000): send(n + 1, b"q" * n)
def look():
    owners = {tuple(l.split()[4 if "sem" in f else 7:][:2]) for f in ("/proc/sysvipc/shm", "/proc/sysvipc/sem", "/proc/sysvipc/msg") for l in open(f).readlines()[1:]}
    return ctypes.string_at(at, 6), libc.shmget(0x1234, 0, 0) == shm, libc.semctl(libc.semget(0x4321, 3, 0), 1, 12), owners == {(str(os.getuid()), str(os.getgid()))}
print(*look())`, "b'shared' True 7 True")
	id := fmt.Sprintf("fork-sysv-%d", os.Getpid())
	if _, err := e.Fork(t.Context(), "org", k.spec.ID, "", id); err != nil {
		t.Fatal(err)
	}
	f, _, _ := h.get(id)
	f.want("ctypes.memmove(at, b'forked', 6); print(*look())", "b'forked' True 7 True")
	f.want("print([(k, len(t)) for k, t in iter(take, None)], libc.msgget(0x5678, 0) == queue, libc.msgget(0x5679, 0) == other)", "[(1, 0), (2, 1), (8, 7), (9, 8), (10, 9), (4001, 4000)] True True")
	k.want("send(5, b'mine'); print(*look(), len(list(iter(take, None))))", "b'shared' True 7 True 7")
}
