package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
)

// part is what a child process of a measurement plays. It answers one line for
// each line it reads from stdin and ends at its end.
type part interface {
	// do answers a command with a value that is sent back as JSON.
	do(cmd string) (any, error)
	close()
}

type partReply struct {
	Value json.RawMessage
	Error string
	CPU   time.Duration
}

// play runs a part that mk makes of its configuration.
func play[C any](mk func(C) (part, error)) func() int {
	return func() int { return playPart(mk) }
}

func playPart[C any](mk func(C) (part, error)) int {
	in := bufio.NewReader(os.Stdin)
	line, err := in.ReadString('\n')
	if err != nil {
		return 1
	}
	var cfg C
	if err := json.Unmarshal([]byte(line), &cfg); err != nil {
		return 2
	}
	r, err := mk(cfg)
	reply := func(v any, err error) {
		var rep partReply
		if err != nil {
			rep.Error = err.Error()
		}
		rep.Value, _ = json.Marshal(v)
		rep.CPU = cpuSelf()
		b, _ := json.Marshal(rep)
		fmt.Fprintf(os.Stdout, "%s\n", b)
	}
	reply(nil, err)
	if err != nil {
		return 1
	}
	defer r.close()
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return 0
		}
		reply(r.do(strings.TrimSpace(line)))
	}
}

// child is a part that runs in a process of its own.
type child struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
	cpu time.Duration // at the last reply
}

// start runs a role with cfg.
func start(ctx context.Context, name string, cfg any) (*child, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, exe)
	cmd.Env = append(os.Environ(), roleVariable+"="+name)
	cmd.Stderr = os.Stderr
	p := &child{cmd: cmd}
	if p.in, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewReader(out)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	b, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	if err := p.ask(string(b), nil); err != nil {
		p.stop()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return p, nil
}

// ask sends a command and decodes the answer into v.
func (p *child) ask(cmd string, v any) error {
	if _, err := io.WriteString(p.in, cmd+"\n"); err != nil {
		return err
	}
	line, err := p.out.ReadBytes('\n')
	if err != nil {
		return err
	}
	var rep partReply
	if err := json.Unmarshal(line, &rep); err != nil {
		return err
	}
	p.cpu = rep.CPU
	if rep.Error != "" {
		return fmt.Errorf("%s", rep.Error)
	}
	if v == nil {
		return nil
	}
	return json.Unmarshal(rep.Value, v)
}

func (p *child) pid() int { return p.cmd.Process.Pid }

// stop lets the part end by itself.
func (p *child) stop() {
	_ = p.in.Close()
	timer := time.AfterFunc(10*time.Second, func() { _ = p.cmd.Process.Kill() })
	defer timer.Stop()
	_ = p.cmd.Wait()
}

// kill is kill -9.
func (p *child) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// cpuSelf is the CPU time of this process.
func cpuSelf() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// uniqueMemory is what a process has for itself, in bytes: its private pages.
func uniqueMemory(pid int) (int64, error) {
	sum := procKiB(pid, "smaps_rollup", "Private_Clean") + procKiB(pid, "smaps_rollup", "Private_Dirty")
	if sum == 0 {
		return 0, fmt.Errorf("the memory of process %d cannot be read", pid)
	}
	return sum, nil
}

// quantile of a sample; it sorts it.
func quantile(d []time.Duration, q float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return d[min(int(float64(len(d))*q), len(d)-1)]
}
