package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// canShiftClock tells whether shiftClock works here.
const canShiftClock = true

// shiftVariable makes this test binary run a program under a shifted clock; it
// holds the shift in seconds.
const shiftVariable = "POSTERN_E2E_SHIFT_CLOCK"

func init() {
	if text := os.Getenv(shiftVariable); text != "" {
		code, err := runShifted(text, os.Args[1:])
		if err != nil {
			fmt.Fprintln(os.Stderr, "shift the clock:", err)
			code = 125
		}
		os.Exit(code)
	}
}

// shiftClock makes a command see a clock that is off by this much. The program
// is the real one: a tracer (this test binary once more) takes the vDSO away from
// it, so that it asks the kernel for the time, and changes the answers. Nothing
// else on the machine notices.
func shiftClock(cmd *exec.Cmd, by time.Duration) {
	cmd.Args = append([]string{os.Args[0], cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/proc/self/exe"
	cmd.Env = append(cmd.Env, shiftVariable+"="+strconv.Itoa(int(by/time.Second)))
}

func runShifted(seconds string, args []string) (int, error) {
	shift, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return 0, err
	}
	runtime.LockOSThread() // ptrace knows threads
	os.Unsetenv(shiftVariable)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	pid := cmd.Process.Pid
	var status syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &status, 0, nil); err != nil || !status.Stopped() {
		return 0, fmt.Errorf("it did not stop at exec: %v", err)
	}
	if err := hideVDSO(pid); err != nil {
		return 0, err
	}
	const options = unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_EXITKILL
	if err := syscall.PtraceSetOptions(pid, options); err != nil {
		return 0, err
	}
	if err := syscall.PtraceSyscall(pid, 0); err != nil {
		return 0, err
	}
	inside := map[int]bool{} // threads that are in a system call
	seen := map[int]bool{pid: true}
	for {
		tid, err := syscall.Wait4(-1, &status, syscall.WALL, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		} else if err != nil {
			return 0, err
		}
		if tid == pid && status.Exited() {
			return status.ExitStatus(), nil
		}
		if tid == pid && status.Signaled() {
			return 128 + int(status.Signal()), nil
		}
		if !status.Stopped() {
			continue // a thread has ended
		}
		signal := int(status.StopSignal())
		switch {
		case signal == int(syscall.SIGTRAP)|0x80:
			if inside[tid] = !inside[tid]; inside[tid] {
				keepDumpable(tid)
			} else {
				shiftAnswer(tid, shift)
			}
			signal = 0
		case signal == int(syscall.SIGTRAP): // a thread was made
			signal = 0
		case signal == int(syscall.SIGSTOP) && !seen[tid]: // the new thread itself
			seen[tid] = true
			signal = 0
		}
		seen[tid] = true
		if err := syscall.PtraceSyscall(tid, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			return 0, err
		}
	}
}

// shiftAnswer changes what clock_gettime has just answered.
func shiftAnswer(tid int, shift int64) {
	var regs syscall.PtraceRegs
	if syscall.PtraceGetRegs(tid, &regs) != nil || regs.Orig_rax != unix.SYS_CLOCK_GETTIME || regs.Rdi != unix.CLOCK_REALTIME || regs.Rax != 0 {
		return
	}
	var word [8]byte
	at := uintptr(regs.Rsi)
	if _, err := syscall.PtracePeekData(tid, at, word[:]); err != nil {
		return
	}
	binary.LittleEndian.PutUint64(word[:], binary.LittleEndian.Uint64(word[:])+uint64(shift))
	syscall.PtracePokeData(tid, at, word[:]) //nolint:errcheck // then the test fails
}

// keepDumpable makes another system call of prctl(PR_SET_DUMPABLE): a tracer that
// is not root could not write to the program any more.
func keepDumpable(tid int) {
	var regs syscall.PtraceRegs
	if syscall.PtraceGetRegs(tid, &regs) != nil || regs.Orig_rax != unix.SYS_PRCTL || regs.Rdi != unix.PR_SET_DUMPABLE {
		return
	}
	regs.Orig_rax = unix.SYS_GETPID
	syscall.PtraceSetRegs(tid, &regs) //nolint:errcheck // then the test fails
}

// hideVDSO crosses the vDSO out of the auxiliary vector of a process that has not
// run yet: argc, argv, 0, environment, 0, pairs.
func hideVDSO(pid int) error {
	const atIgnore, atSysinfoEHDR = 1, 33
	var regs syscall.PtraceRegs
	if err := syscall.PtraceGetRegs(pid, &regs); err != nil {
		return err
	}
	at := uintptr(regs.Rsp)
	next := func() (uint64, error) {
		var word [8]byte
		_, err := syscall.PtracePeekData(pid, at, word[:])
		at += 8
		return binary.LittleEndian.Uint64(word[:]), err
	}
	argc, err := next()
	if err != nil {
		return err
	}
	at += uintptr(argc+1) * 8
	for {
		if word, err := next(); err != nil {
			return err
		} else if word == 0 {
			break
		}
	}
	for {
		kind, err := next()
		if err != nil {
			return err
		}
		if kind == 0 {
			return errors.New("there is no vDSO")
		}
		if kind == atSysinfoEHDR {
			_, err := syscall.PtracePokeData(pid, at-8, []byte{atIgnore, 0, 0, 0, 0, 0, 0, 0})
			return err
		}
		at += 8
	}
}
