package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/e2e/stack"
)

// fileSizes are the amounts of measureFiles.
type fileSizes struct {
	file    int64 // bytes of the file that is read
	written int64 // bytes of one file that is written
	rounds  int   // of everything that is compared
	random  int   // accesses of 4 KiB in a round
	creates int
	dirs    int // of a thousand files each, to list
}

// measureFiles measures a workspace mounted by the real agentd against the file system
// of the same disk, sshfs and the bare tunnel. Only mountd serves the mount; this process
// and programs that it starts use it. docs/performance.md says what limits the figures.
func measureFiles(ctx context.Context, o Options, r *Report) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("mounts need root")
	}
	size := fileSizes{file: 256 << 20, written: 64 << 20, rounds: 5, random: 100_000, creates: 10_000, dirs: 100}
	if o.Short {
		size = fileSizes{file: 64 << 20, written: 16 << 20, rounds: 2, random: 20_000, creates: 1000, dirs: 5}
	}
	b, err := startFiles(ctx, o, r)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.end()) }()
	for _, part := range []struct {
		name string
		run  func(context.Context, fileSizes) error
	}{
		{"warm reads and writes in place", b.warm},
		{"staged writes", b.staged},
		{"creates", b.creates},
		{"listing", b.listing},
		{"cold reads", b.cold},
		{"distant cold reads", b.distant},
	} {
		if !o.wantsPart(part.name) {
			continue
		}
		began := time.Now()
		if err := part.run(ctx, size); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		r.Printf("(%s: %.1f s; mountd has %.0f MiB, %.0f of them not files)", part.name, time.Since(began).Seconds(),
			float64(residentMemory(b.pid))/(1<<20), float64(procKiB(b.pid, "status", "RssAnon"))/(1<<20))
	}
	pid, err := b.mountd(ctx)
	if err != nil {
		return err
	}
	if pid != b.pid {
		return fmt.Errorf("mountd is process %d now and was %d: its CPU and memory were not all measured", pid, b.pid)
	}
	r.Printf("mountd: %.0f MiB resident, %.0f MiB at its peak", float64(residentMemory(pid))/(1<<20), float64(procKiB(pid, "status", "VmHWM"))/(1<<20))
	r.AtMost("files-mountd-memory", float64(residentMemory(pid))/(1<<20), 100, "MiB")
	return nil
}

// filesBench is a stack whose agent mounts workspaces.
type filesBench struct {
	r      *Report
	s      *stack.Stack
	agent  *stack.Agent
	mounts string // below which the agent mounts
	native string // a directory on the same disk
	lab    string // where a workspace is mounted that is used by several parts
	pid    int    // mountd's
	bin    string // where programs are
}

func startFiles(ctx context.Context, o Options, r *Report) (_ *filesBench, err error) {
	s, err := stack.New(stack.Options{Bin: o.Bin})
	if err != nil {
		return nil, err
	}
	b := &filesBench{r: r, s: s, mounts: filepath.Join(s.Dir, "mounts"), native: filepath.Join(s.Dir, "native"), bin: o.Bin}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.end())
		}
	}()
	if err := errors.Join(os.Mkdir(b.mounts, 0o755), os.Mkdir(b.native, 0o755)); err != nil {
		return nil, err
	}
	if err := s.StartControlPlane(ctx); err != nil {
		return nil, err
	}
	if b.agent, err = s.Join(ctx, "bench", "attachments: {host_mounts: ["+b.mounts+"]}\n"); err != nil {
		return nil, err
	}
	if b.pid, err = b.awaitMountd(ctx); err != nil {
		return nil, err
	}
	if _, err := b.s.Postern(ctx, "workspace", "create", "lab"); err != nil {
		return nil, err
	}
	b.lab, err = b.mount(ctx, "lab")
	return b, err
}

// end takes mounts away before anything below them is removed, and ends what agentd
// leaves running: keeper and mountd.
func (b *filesBench) end() error {
	var problems []error
	entries, _ := os.ReadDir(b.mounts)
	for _, e := range entries {
		dir := filepath.Join(b.mounts, e.Name())
		if !mounted(dir) {
			continue
		}
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			problems = append(problems, fmt.Errorf("unmount %s: %w", dir, err))
		}
	}
	if len(problems) > 0 { // never remove what is in a mount
		return errors.Join(problems...)
	}
	for _, a := range b.s.Agents {
		if a.Process != nil && a.Process.Running() { // first, for it would start mountd again
			if err := a.Process.Stop(40 * time.Second); err != nil {
				problems = append(problems, err)
			}
		}
		for _, pid := range attachProcesses(a.StateDir()) {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
	return errors.Join(append(problems, b.s.Close())...)
}

// attachProcesses are the keeper, before mountd, of a state directory.
func attachProcesses(state string) []int {
	var keepers, others []int
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range found {
		text, _ := os.ReadFile(path)
		args := bytes.Split(text, []byte{0})
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil || len(args) < 2 || !bytes.Contains(text, []byte(state)) {
			continue
		}
		switch string(args[1]) {
		case "fdkeeper":
			keepers = append(keepers, pid)
		case "mountd":
			others = append(others, pid)
		}
	}
	return append(keepers, others...)
}

// mounted says whether a file system is mounted on dir.
func mounted(dir string) bool {
	text, err := os.ReadFile("/proc/self/mounts")
	return err == nil && bytes.Contains(text, []byte(" "+dir+" "))
}

// agentd runs a command of the agent's that talks to the running one.
func (b *filesBench) agentd(ctx context.Context, args ...string) (string, error) {
	return b.agent.Run(ctx, "", append(args, "--state", b.agent.StateDir(), "--runtime", b.agent.RuntimeDir())...)
}

// fileStatus is what this needs of `agentd status`.
type fileStatus struct {
	Attachments struct {
		PID        int
		Error      string
		Workspaces []struct {
			Workspace     string
			UnsentChanges int    `json:"unsent_changes"`
			UnsentBytes   int64  `json:"unsent_bytes"`
			LastError     string `json:"last_error"`
		}
	}
}

func (b *filesBench) status(ctx context.Context) (s fileStatus, err error) {
	text, err := b.agentd(ctx, "status", "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(text), &s)
	}
	return s, err
}

// mountd is the process that serves the mounts.
func (b *filesBench) mountd(ctx context.Context) (int, error) {
	s, err := b.status(ctx)
	if err != nil {
		return 0, err
	}
	if s.Attachments.PID == 0 {
		return 0, fmt.Errorf("mountd does not answer: %s", s.Attachments.Error)
	}
	return s.Attachments.PID, nil
}

// awaitMountd waits for the process that serves the mounts: it starts beside the tunnel.
func (b *filesBench) awaitMountd(ctx context.Context) (int, error) {
	for until := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		pid, err := b.mountd(ctx)
		if err == nil || ctx.Err() != nil || time.Now().After(until) {
			return pid, err
		}
	}
}

// drain waits until everything written is at the control plane, so that sending it is
// not counted for what comes next.
func (b *filesBench) drain(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	for {
		s, err := b.status(ctx)
		if err != nil {
			return 0, err
		}
		left := ""
		for _, w := range s.Attachments.Workspaces {
			if w.UnsentChanges > 0 || w.UnsentBytes > 0 {
				left = fmt.Sprintf("%d changes and %d bytes of %s %s", w.UnsentChanges, w.UnsentBytes, w.Workspace, w.LastError)
			}
		}
		if left == "" {
			return time.Since(began), nil
		}
		if time.Since(began) > 3*time.Minute {
			return 0, fmt.Errorf("still unsent after three minutes: %s", left)
		}
		select {
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// mount mounts a workspace and returns where.
func (b *filesBench) mount(ctx context.Context, workspace string) (string, error) {
	dir := filepath.Join(b.mounts, workspace)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	if _, err := b.agentd(ctx, "mount", workspace, dir); err != nil {
		return "", err
	}
	if !mounted(dir) { // or everything below would measure the disk
		return "", fmt.Errorf("agentd mount ended well, and nothing is mounted on %s", dir)
	}
	return dir, nil
}

// listing lists many entries with ls, of which the host knows nothing at first, then again.
func (b *filesBench) listing(ctx context.Context, size fileSizes) error {
	tree := filepath.Join(b.native, "tree")
	for d := range size.dirs {
		dir := filepath.Join(tree, fmt.Sprintf("directory-%03d", d))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		for f := range 1000 {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("file-%04d.txt", f)), nil, 0o644); err != nil {
				return err
			}
		}
	}
	began := time.Now()
	if _, err := b.s.Postern(ctx, "workspace", "create", "tree"); err != nil {
		return err
	}
	if _, err := b.s.Postern(ctx, "file", "put", "-r", tree, "tree:/"); err != nil {
		return err
	}
	b.r.Printf("%d entries put by postern in %.1f s", size.dirs*1001, time.Since(began).Seconds())
	began = time.Now()
	dir, err := b.mount(ctx, "tree")
	if err != nil {
		return err
	}
	mounting := time.Since(began)
	want := size.dirs * 1000
	cold, err := list(ctx, filepath.Join(dir, "tree"), want)
	if err != nil {
		return err
	}
	var warm, native []float64
	for range 3 {
		w, err := list(ctx, filepath.Join(dir, "tree"), want)
		if err != nil {
			return err
		}
		n, err := list(ctx, tree, want)
		if err != nil {
			return err
		}
		warm, native = append(warm, w.Seconds()), append(native, n.Seconds())
	}
	b.r.Printf("ls -lR of %d files in %d directories: mounting %.2f s, cold %.2f s, warm %.2f s; native %.2f s", want, size.dirs, mounting.Seconds(), cold.Seconds(), median(warm), median(native))
	b.r.AtMost("files-list-cold", (mounting + cold).Seconds(), 5, "s")
	b.r.AtMost("files-list-warm", median(warm), 1, "s")
	return os.RemoveAll(tree)
}

// list runs ls -lR and looks whether it has listed as many files as there are.
func list(ctx context.Context, dir string, want int) (time.Duration, error) {
	cmd := exec.CommandContext(ctx, "ls", "-lR", dir)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	began := time.Now()
	out, err := cmd.Output()
	took := time.Since(began)
	if err != nil {
		return 0, fmt.Errorf("ls -lR %s: %w", dir, err)
	}
	if got := strings.Count(string(out), "\n-"); got != want {
		return 0, fmt.Errorf("ls -lR %s shows %d files, not %d", dir, got, want)
	}
	return took, nil
}

func perGB(cpu time.Duration, n int64) float64 { return cpu.Seconds() / (float64(n) / 1e9) }

// everyCPU is the CPU time of control plane, agentd and mountd.
func (b *filesBench) everyCPU() [3]time.Duration {
	return [3]time.Duration{cpuTime(b.s.ControlPlane.PID()), cpuTime(b.agent.Process.PID()), cpuTime(b.pid)}
}
