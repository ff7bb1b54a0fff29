package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/stats"
	"golang.org/x/sys/unix"
)

// rawClient runs cells in a kernel by jupyter_client: one for each line of its input, the
// first of which names the connection file.
const rawClient = `
import sys, json
from jupyter_client import BlockingKernelClient
print("ready", flush=True)
path = sys.stdin.readline().strip()
c = BlockingKernelClient(); c.load_connection_file(path); c.start_channels(hb=False)
for line in sys.stdin:
    m = c.execute(json.loads(line))
    while True:
        r = c.get_shell_msg(timeout=300)
        if r["parent_header"].get("msg_id") == m: break
    print(r["content"]["status"], flush=True)
`

// rawKernel is an ipykernel with nothing around it, dumped and restored by criu(8): what
// Postern's checkpoints are measured against.
type rawKernel struct {
	criu, dir, connection string
	pid                   int
}

func startRawKernel(ctx context.Context, criu, cell string) (*rawKernel, error) {
	// Restored processes become this one's children, to be waited for: a zombie's id is
	// not free for the next restore.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("/dev/shm", "postern-bench-raw-")
	if err != nil {
		return nil, err
	}
	k := &rawKernel{criu: criu, dir: dir, connection: filepath.Join(dir, "connection.json")}
	text := fmt.Sprintf(`{"transport": "ipc", "ip": %q, "shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5,
		"signature_scheme": "hmac-sha256", "key": "0123456789abcdef", "kernel_name": "python3"}`, filepath.Join(dir, "k"))
	if err := os.WriteFile(k.connection, []byte(text), 0o600); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close() //nolint:errcheck // the kernel has it
	cmd := exec.Command("/usr/bin/python3", "-m", "ipykernel_launcher", "-f", k.connection, "--HistoryManager.enabled=False")
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = "/", log, log, &syscall.SysProcAttr{Setsid: true}
	cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + dir, "LC_ALL=C.UTF-8"}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	k.pid = cmd.Process.Pid
	c, err := k.client(ctx, cell)
	if err != nil {
		k.end()
		return nil, err
	}
	return k, c.close()
}

// client starts a client program and runs a cell; an empty cell: it waits for one.
func (k *rawKernel) client(ctx context.Context, cell string) (*rawPeer, error) {
	cmd := exec.CommandContext(ctx, "/usr/bin/python3", "-c", rawClient)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &rawPeer{cmd: cmd, in: in, out: bufio.NewReader(out), said: &said}
	if err := p.expect("ready"); err != nil || cell == "" {
		return p, err
	}
	return p, p.run(k.connection, cell)
}

type rawPeer struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
	said *strings.Builder
}

func (p *rawPeer) expect(want string) error {
	line, err := p.out.ReadString('\n')
	if err != nil || strings.TrimSpace(line) != want {
		_ = p.close()
		return fmt.Errorf("the client of the raw kernel said %q, not %q: %s", line, want, p.said)
	}
	return nil
}

func (p *rawPeer) run(connection, cell string) error {
	if _, err := fmt.Fprintf(p.in, "%s\n%q\n", connection, cell); err != nil {
		return err
	}
	return p.expect("ok")
}

func (p *rawPeer) close() error {
	_ = p.in.Close()
	return p.cmd.Wait()
}

// rawImages are what a dump wrote. Times are in milliseconds.
type rawImages struct {
	dir          string
	frozen, took float64
	bytes        int64
}

func (i rawImages) remove() { _ = os.RemoveAll(i.dir) }

// dump dumps into a tmpfs.
func (k *rawKernel) dump(ctx context.Context, leave bool) (rawImages, error) {
	dir, err := os.MkdirTemp(k.dir, "images-")
	if err != nil {
		return rawImages{}, err
	}
	args := []string{"dump", "-t", fmt.Sprint(k.pid), "-D", dir, "-o", "criu.log", "-v2", "--tcp-established", "--manage-cgroups=ignore", "--network-lock", "skip"}
	if leave {
		args = append(args, "--leave-running")
	}
	began := time.Now()
	if out, err := exec.CommandContext(ctx, k.criu, args...).CombinedOutput(); err != nil {
		log, _ := os.ReadFile(filepath.Join(dir, "criu.log"))
		return rawImages{}, fmt.Errorf("criu dump: %w: %s %.2000s", err, out, log)
	}
	i := rawImages{dir: dir, took: since(began)}
	d, err := os.Open(dir)
	if err != nil {
		return i, err
	}
	defer d.Close() //nolint:errcheck // it is only read
	s, err := stats.CriuGetDumpStats(d)
	if err != nil {
		return i, err
	}
	i.frozen = float64(s.GetFreezingTime()+s.GetFrozenTime()) / 1000
	i.bytes, err = diskUse(dir)
	return i, err
}

// again ends the kernel with a dump, restores it, and times criu restore and a client's
// first result. program counts the start of the client's program too.
func (k *rawKernel) again(ctx context.Context, program bool) (first, restore float64, err error) {
	i, err := k.dump(ctx, false)
	if err != nil {
		return 0, 0, err
	}
	defer i.remove()
	var status unix.WaitStatus
	if _, err := unix.Wait4(k.pid, &status, 0, nil); err != nil && !errors.Is(err, unix.ECHILD) {
		return 0, 0, err
	}
	var p *rawPeer
	if !program {
		if p, err = k.client(ctx, ""); err != nil {
			return 0, 0, err
		}
	}
	began := time.Now()
	cmd := exec.CommandContext(ctx, k.criu, "restore", "-d", "-D", i.dir, "-o", "restore.log", "-v2", "--tcp-established", "--manage-cgroups=ignore", "--network-lock", "skip")
	if out, err := cmd.CombinedOutput(); err != nil {
		log, _ := os.ReadFile(filepath.Join(i.dir, "restore.log"))
		return 0, 0, fmt.Errorf("criu restore: %w: %s %.2000s", err, out, log)
	}
	restore = since(began)
	if program {
		p, err = k.client(ctx, "6*7")
	} else {
		err = p.run(k.connection, "6*7")
	}
	first = since(began)
	if err != nil {
		return 0, 0, err
	}
	return first, restore, p.close()
}

// end ends the kernel and removes what it left.
func (k *rawKernel) end() {
	_ = unix.Kill(k.pid, unix.SIGKILL)
	var status unix.WaitStatus
	_, _ = unix.Wait4(k.pid, &status, 0, nil)
	_ = os.RemoveAll(k.dir)
}
