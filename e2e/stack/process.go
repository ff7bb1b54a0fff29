package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Process is one program under way.
type Process struct {
	// Name is for messages; LogFile has its standard output and error.
	Name, LogFile string

	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// start runs a program with its output appended to logFile.
func start(name, logFile string, cmd *exec.Cmd) (*Process, error) {
	log, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close() //nolint:errcheck // the program has its own copy
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &Process{Name: name, LogFile: logFile, cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// PID is the process's id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended; then Err says how.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err is how it ended; only after Done.
func (p *Process) Err() error { return p.err }

// Running reports whether it has not ended.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Signal sends a signal, if the process still runs.
func (p *Process) Signal(s syscall.Signal) {
	if p.Running() {
		p.cmd.Process.Signal(s) //nolint:errcheck // it may just have ended
	}
}

// Kill ends it at once and waits.
func (p *Process) Kill() {
	p.Signal(syscall.SIGKILL)
	<-p.done
}

// Stop asks it to end and waits; after patience it is killed, which is an error.
func (p *Process) Stop(patience time.Duration) error {
	p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(patience):
		p.Kill()
		return fmt.Errorf("%s did not end within %s of SIGTERM\n%s", p.Name, patience, p.Tail(20))
	}
	var exit *exec.ExitError
	if errors.As(p.err, &exit) && exit.ExitCode() != 0 {
		return fmt.Errorf("%s ended with %w\n%s", p.Name, p.err, p.Tail(20))
	}
	return nil
}

// Log is all that it has printed.
func (p *Process) Log() string {
	text, err := os.ReadFile(p.LogFile)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Tail is the last n lines of its log.
func (p *Process) Tail(n int) string {
	lines := strings.Split(strings.TrimRight(p.Log(), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// Children are the ids of the process's children.
func (p *Process) Children() []int { return children(p.PID()) }

// ChildrenNamed are those of the children whose first argument is this:
// sql-session or sql-parser of agentd.
func (p *Process) ChildrenNamed(argument string) (pids []int) {
	for _, pid := range p.Children() {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			continue // it has ended
		}
		if args := bytes.Split(text, []byte{0}); len(args) > 1 && string(args[1]) == argument {
			pids = append(pids, pid)
		}
	}
	return pids
}

func children(pid int) []int {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	var all []int
	for _, path := range tasks {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has ended
		}
		for _, field := range bytes.Fields(text) {
			var child int
			if _, err := fmt.Sscan(string(field), &child); err == nil {
				all = append(all, child)
			}
		}
	}
	return all
}

// await polls until ready returns nil, the process ends or ctx does.
func (p *Process) await(ctx context.Context, what string, ready func() error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended before %s: %v\n%s", p.Name, what, p.err, p.Tail(20))
		case <-ctx.Done():
			return fmt.Errorf("%s: waiting for %s: %w (%v)\n%s", p.Name, what, ctx.Err(), err, p.Tail(20))
		case <-tick.C:
		}
	}
}
