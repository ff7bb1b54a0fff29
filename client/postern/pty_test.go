package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/client/internal/simulatedcontrolplane"
)

// terminate asks a process to go.
const terminate = syscall.SIGTERM

// terminal is the command on a pseudo-terminal of its own.
type terminal struct {
	t      *testing.T
	master *os.File
	cmd    *exec.Cmd
	mu     sync.Mutex
	seen   bytes.Buffer
	read   chan struct{}
}

// onTerminal starts postern on a terminal; stdout goes there too unless it is
// given.
func onTerminal(t *testing.T, s *simulatedcontrolplane.Server, stdout *os.File, args ...string) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	// Not Fd: that would make reads block for good, past Close.
	raw, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var n int
	if cerr := raw.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
			n, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
	}); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	if stdout == nil {
		stdout = slave
	}
	path, err := exec.LookPath("postern") // testscript puts it there
	if err != nil {
		t.Fatal(err)
	}
	term := &terminal{t: t, master: master, read: make(chan struct{}), cmd: exec.Command(path, args...)}
	home := t.TempDir()
	term.cmd.Env = []string{"HOME=" + home, "XDG_CONFIG_HOME=" + filepath.Join(home, "config"), "POSTERN_URL=" + s.URL, "POSTERN_TOKEN=" + simulatedcontrolplane.AdminToken, "TERM=xterm", "PAGER=" + os.Getenv("PAGER")}
	if raw.Control(func(fd uintptr) {
		err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: 40, Col: 120})
	}) != nil || err != nil {
		t.Fatal(err)
	}
	term.cmd.Stdin, term.cmd.Stdout, term.cmd.Stderr = slave, stdout, slave
	term.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := term.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(term.read)
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			term.mu.Lock()
			term.seen.Write(buf[:n])
			term.mu.Unlock()
			if err != nil { // EIO: the last one has closed the terminal
				return
			}
		}
	}()
	return term
}

func (term *terminal) text() string {
	term.mu.Lock()
	defer term.mu.Unlock()
	return term.seen.String()
}

// await waits until text has appeared.
func (term *terminal) await(text string) {
	term.t.Helper()
	for deadline := time.Now().Add(time.Minute); !strings.Contains(term.text(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			term.cmd.Process.Kill()
			term.t.Fatalf("%q did not appear in %q", text, term.text())
		}
	}
}

// line types a line.
func (term *terminal) line(text string) {
	if _, err := term.master.WriteString(text); err != nil {
		term.t.Fatal(err)
	}
}

// wait returns the exit code and all that was shown.
func (term *terminal) wait() (int, string) {
	term.t.Helper()
	err := term.cmd.Wait()
	<-term.read
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), term.text()
	}
	if err != nil {
		term.t.Fatal(err)
	}
	return 0, term.text()
}

func simulated(t *testing.T) *simulatedcontrolplane.Server {
	t.Helper()
	s := simulatedcontrolplane.Start(false)
	t.Cleanup(s.Close)
	return s
}

func TestLoginDoesNotShowTheToken(t *testing.T) {
	term := onTerminal(t, simulated(t), nil, "login")
	term.await("API token (not shown): ")
	// The prompt is out before the echo is off: look at the terminal itself.
	awaitNoEcho(t, term.master)
	term.line(simulatedcontrolplane.AdminToken + "\n")
	code, text := term.wait()
	if code != 0 || !strings.Contains(text, "logged in to") || strings.Contains(text, simulatedcontrolplane.AdminToken) {
		t.Errorf("exit %d: %q", code, text)
	}
}

func awaitNoEcho(t *testing.T, master *os.File) {
	t.Helper()
	raw, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		var state *unix.Termios
		if err := raw.Control(func(fd uintptr) { state, err = unix.IoctlGetTermios(int(fd), unix.TCGETS) }); err != nil {
			t.Fatal(err)
		}
		if state != nil && state.Lflag&unix.ECHO == 0 {
			return
		}
	}
	t.Fatal("the terminal still echoes")
}

func TestBinaryFormatsAreRefusedOnATerminal(t *testing.T) {
	code, text := onTerminal(t, simulated(t), nil, "sql", "edge-1/warehouse", "-f", "parquet", "select 1").wait()
	if code != 2 || !strings.Contains(text, "parquet is not fit for a terminal: write it to a file with -O FILE, or pipe it") {
		t.Errorf("exit %d: %q", code, text)
	}
}

func TestProgress(t *testing.T) {
	s := simulated(t)
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	term := onTerminal(t, s, null, "sql", "edge-1/warehouse", "-f", "csv", "wait")
	term.await("10 rows  ")
	term.line("\x03") // Ctrl-C
	code, text := term.wait()
	if code != 1 || !strings.Contains(text, "postern: interrupted: the statement was cancelled") {
		t.Errorf("exit %d: %q", code, text)
	}
	// The line is erased before anything else is said.
	if !strings.Contains(text, "\r\x1b[Kpostern: ") {
		t.Errorf("the progress line stays: %q", text)
	}
}

func TestNoProgressAmongRows(t *testing.T) {
	term := onTerminal(t, simulated(t), nil, "sql", "edge-1/warehouse", "-f", "csv", "wait")
	term.await("10,name 10")
	time.Sleep(progressAfter + 2*progressEvery) // a line would appear now
	term.line("\x03")
	if _, text := term.wait(); strings.Contains(text, "MiB/s") {
		t.Errorf("progress among rows: %q", text)
	}
}

func TestFooter(t *testing.T) {
	code, text := onTerminal(t, simulated(t), nil, "sql", "edge-1/warehouse", "-f", "csv", "rows 2").wait()
	if code != 0 || !strings.Contains(text, "2,name 2\r\n(2 rows, ") {
		t.Errorf("exit %d: %q", code, text)
	}
}
