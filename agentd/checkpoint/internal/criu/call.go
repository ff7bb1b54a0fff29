package criu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/proto"
)

// grace is how long CRIU has to undo its work when its helper is gone: its socket is
// closed, which it finds at the next step. A kill in the middle of a step can leave a
// task with somebody else's registers.
const grace = 3 * time.Second

// call runs one helper. A missing deadline becomes DefaultTimeout.
func (d *Driver) call(ctx context.Context, req request, inherit map[string]*os.File) (event, error) {
	if _, has := ctx.Deadline(); !has {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, DefaultTimeout)
		defer cancel()
	}
	if err := ctx.Err(); err != nil {
		return event{}, err
	}
	req.Criu, req.Preload = d.Path, d.preload()
	out, in, err := os.Pipe()
	if err != nil {
		return event{}, fmt.Errorf("criu helper: %w", err)
	}
	defer out.Close() //nolint:errcheck // a pipe
	cmd := exec.Command(d.Self, HelperArg)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "GODEBUG=containermaxprocs=0,updatemaxprocs=0", "GOMAXPROCS=2"}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.ExtraFiles = []*os.File{in}
	for _, key := range sortedKeys(inherit) {
		req.Inherit = append(req.Inherit, key)
		cmd.ExtraFiles = append(cmd.ExtraFiles, inherit[key])
	}
	var stderr limited
	cmd.Stderr = &stderr
	// A descendant may keep stderr open longer than the helper lives.
	cmd.WaitDelay = grace
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	_ = in.Close()
	if err != nil {
		return event{}, fmt.Errorf("start the CRIU helper: %w", err)
	}
	line, err := json.Marshal(req)
	if err == nil {
		_, err = stdin.Write(append(line, '\n'))
	}
	_ = err // the helper is gone then, which is found below

	w := &watch{group: cmd.Process.Pid, root: -1}
	defer w.close()
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	answer, answered := w.read(out)
	stop()
	_ = stdin.Close()
	if !answered {
		_ = cmd.Process.Kill()
	}
	// The group's id stays taken until the helper is waited for.
	w.endGroup(answered)
	waitErr := cmd.Wait()
	switch {
	case answered && answer.Failed == "":
		return answer, nil
	case ctx.Err() != nil && !answered:
		w.endTree()
		return event{}, &Error{Op: req.Op, Cause: CauseTimeout, Err: context.Cause(ctx)}
	}
	if req.Op == opRestore {
		w.endTree()
	}
	if answered && answer.Copy {
		e := &Error{Op: req.Op, Cause: CauseCopy, Err: errors.New(oneLine(answer.Failed))}
		if answer.Full {
			e.Cause = CauseNoSpace
		}
		return event{}, e
	}
	cause := errGone
	if answered {
		cause = errors.New(oneLine(answer.Failed))
	} else if waitErr != nil {
		cause = fmt.Errorf("%w (%v)", errGone, waitErr)
	}
	if s := oneLine(stderr.String()); s != "" {
		cause = fmt.Errorf("%w: %s", cause, s)
	}
	e := &Error{Op: req.Op, Err: cause}
	if req.Images != "" {
		e.Lines = firstErrors(filepath.Join(req.Images, logName))
	}
	e.Cause = causeOf(e.Lines)
	if (!answered || answer.Killed) && e.Cause != CauseNoSpace { // what the log says then is how CRIU took it
		e.Cause = CauseKilled
	}
	return event{}, e
}

func sortedKeys(m map[string]*os.File) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// watch is what is known of a running helper.
type watch struct {
	group int
	root  int // a pidfd of the tree that is being restored; -1: none yet
}

func (w *watch) close() {
	if w.root >= 0 {
		_ = unix.Close(w.root)
	}
}

// read reads events until the answer, or until the helper and everything that has its
// pipe is gone.
func (w *watch) read(out *os.File) (event, bool) {
	lines := bufio.NewScanner(io.LimitReader(out, maxEvents))
	lines.Buffer(nil, maxEvents)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			return event{}, false
		}
		if e.Done {
			return e, true
		}
		if e.Born > 0 && w.root < 0 {
			if fd, err := unix.PidfdOpen(e.Born, 0); err == nil {
				w.root = fd
			}
		}
	}
	return event{}, false
}

// endGroup waits for CRIU to be gone, and kills what remains after the grace time. The
// helper itself is a zombie by then, or about to be one.
func (w *watch) endGroup(answered bool) {
	for deadline := time.Now().Add(grace); !answered && time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if !groupAlive(w.group) {
			break
		}
	}
	if groupAlive(w.group) || !answered {
		_ = unix.Kill(-w.group, unix.SIGKILL)
	}
}

// endTree ends what a failed restore left: CRIU removes its own tree, unless it was
// killed.
func (w *watch) endTree() {
	if w.root < 0 {
		return
	}
	_ = unix.PidfdSendSignal(w.root, unix.SIGKILL, nil, 0)
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(w.root), Events: unix.POLLIN}}, int(grace/time.Millisecond))
}

// Error is CRIU's failure, with its cause as far as its log tells. Its text is one line
// without host secrets (paths of files and process names appear).
type Error struct {
	Op    op
	Cause Cause
	// Lines are the first real errors of CRIU's log, at most 4, each at most 300 bytes.
	Lines []string
	// Err is go-criu's error, the context's error or errGone.
	Err error
}

// Error implements error.
func (e *Error) Error() string {
	text := fmt.Sprintf("criu %s: %s", e.Op, e.Cause)
	if e.Cause == CauseKilled { // the log says how it took that
		return text + ": try again"
	}
	if len(e.Lines) > 0 {
		return text + ": " + e.Lines[0]
	}
	return text + ": " + oneLine(e.Err.Error())
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Public is the error for a user: a code and one line.
func (e *Error) Public() *proto.Error {
	code := proto.CodeUnavailable
	switch e.Cause {
	case CauseTimeout:
		code = proto.CodeTimeout
	case CauseNoSpace:
		code = proto.CodeStorageFull
	case CauseExternalSocket, CauseTCP, CauseTTY, CauseDevice, CauseFileSystem, CauseFileChanged, CauseFileMissing, CauseDeletedFile, CauseLock:
		code = proto.CodeInvalid
	}
	return &proto.Error{Code: code, Message: e.Error(), Err: e.Err}
}
