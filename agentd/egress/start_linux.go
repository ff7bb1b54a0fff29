package egress

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/confine"
)

const (
	maxConfig = 16 << 20 // bytes of a config
	// endTime is how long a process may take to end; then it is killed.
	endTime = 2 * time.Second
	// sendTime bounds what is said to a process.
	sendTime = 15 * time.Second
	// bufferSize is asked for as the buffers of a connection, in bytes, each way. The kernel
	// counts twice that.
	bufferSize = 256 << 10
	// maxComplaints is how many lines of its standard error are logged.
	maxComplaints = 20
)

// config is what a process is told first.
type config struct {
	Scheme      string            `json:"scheme"` // http or https
	Host        string            `json:"host"`   // HOST or HOST:PORT
	Proxy       string            `json:"proxy,omitempty"`
	CAs         [][]byte          `json:"cas,omitempty"`
	Environment map[string]string `json:"environment,omitempty"` // of inheritedVariables
}

// inheritedVariables are what of agentd's environment means something to a process, which
// has none of its own: where the system's CA certificates are.
var inheritedVariables = []string{"SSL_CERT_FILE", "SSL_CERT_DIR"}

// process is one egress process.
type process struct {
	name      string
	cmd       *exec.Cmd
	transport *http.Transport
	exited    chan struct{} // closed when the process is gone and waited for

	mu      sync.Mutex // held while something is sent
	control *net.UnixConn
	closed  bool
}

// start starts a process for a destination. c.mu is held.
func (c *Client) start(to *url.URL) (p *process, err error) {
	said := config{Scheme: to.Scheme, Host: to.Host, CAs: c.config.CAs, Environment: map[string]string{}}
	ports, err := port(to)
	if err != nil {
		return nil, err
	}
	if c.config.Proxy != nil {
		proxy, err := c.config.Proxy(to)
		if err != nil {
			return nil, fmt.Errorf("its proxy: %w", err)
		}
		if proxy != nil {
			said.Proxy = proxy.String()
			if ports, err = port(proxy); err != nil {
				return nil, err
			}
		}
	}
	var readable []string
	for _, name := range inheritedVariables {
		if value := os.Getenv(name); value != "" {
			said.Environment[name] = value
			readable = append(readable, filepath.SplitList(value)...) // SSL_CERT_DIR is a list
		}
	}
	text, err := json.Marshal(said)
	if err != nil {
		return nil, err
	}
	defer clear(text) // the proxy's password
	if len(text) > maxConfig {
		return nil, fmt.Errorf("the CA certificates take more than %d bytes", maxConfig)
	}
	if p, err = c.spawn(confine.Confinement{Executable: c.config.Executable, Ports: []uint16{ports}, Readable: readable}); err != nil {
		return nil, err
	}
	if err := p.say(append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...), nil); err != nil {
		p.kill()
		return nil, err
	}
	return p, nil
}

// spawn starts a process that waits to be told what it is for.
func (c *Client) spawn(confined confine.Confinement) (p *process, err error) {
	if err := confine.CloseOnExec(); err != nil {
		return nil, fmt.Errorf("close_range: %w", err)
	}
	var open []io.Closer
	defer func() {
		if err != nil {
			for _, f := range open {
				_ = f.Close()
			}
		}
	}()
	control, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	open = append(open, control)
	defer theirs.Close() //nolint:errcheck // the process has it, or nobody
	complaints, theirComplaints, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	open = append(open, complaints)
	defer theirComplaints.Close()                      //nolint:errcheck // as above
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0) // here: the thread that starts the process may not
	if err != nil {
		return nil, err
	}
	defer null.Close() //nolint:errcheck // as above
	cmd := &exec.Cmd{
		Path: c.config.Executable, Args: append([]string{"agentd"}, c.config.Args...),
		Env: []string{}, Dir: "/", Stdin: null, Stdout: null, Stderr: theirComplaints, ExtraFiles: []*os.File{theirs},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL},
	}
	if os.Geteuid() == 0 {
		if c.config.UID == 0 {
			return nil, errors.New("it has no user id")
		}
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: c.config.UID, Gid: c.config.UID}
	}
	p = &process{name: c.config.Name, cmd: cmd, control: control, exited: make(chan struct{})}
	confined.Ended = p.exited
	if err := confine.Start(cmd, confined); err != nil {
		return nil, err
	}
	p.transport = &http.Transport{
		DialContext: p.dial, DisableCompression: true, MaxConnsPerHost: maxConnections, MaxIdleConnsPerHost: maxIdle, IdleConnTimeout: time.Minute,
		ResponseHeaderTimeout: c.config.HeaderTime, MaxResponseHeaderBytes: maxHeader,
	}
	c.wg.Go(func() { c.complaints(complaints) })
	c.wg.Go(func() {
		_ = cmd.Wait() // the state says more
		p.ended(c)
	})
	return p, nil
}

// ended notes that the process is gone.
func (p *process) ended(c *Client) {
	close(p.exited)
	p.mu.Lock()
	closed := p.closed
	p.closed = true
	_ = p.control.Close()
	p.mu.Unlock()
	if !closed {
		c.config.Logger.Warn("egress process ended", "pid", p.cmd.Process.Pid, "status", p.cmd.ProcessState.String())
	}
	p.transport.CloseIdleConnections()
}

// gone tells whether the process has ended.
func (p *process) gone() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// dial makes a connection to the process.
func (p *process) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	conn, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close() //nolint:errcheck // the process has its own
	if err = context.Cause(ctx); err == nil {
		err = p.say([]byte{'c'}, theirs)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

func (p *process) say(b []byte, f *os.File) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return net.ErrClosed
	}
	_ = p.control.SetWriteDeadline(time.Now().Add(sendTime))
	if f == nil {
		_, err := p.control.Write(b)
		clear(b)
		return err
	}
	n, oob, err := p.control.WriteMsgUnix(b, syscall.UnixRights(int(f.Fd())), nil)
	if err == nil && (n != len(b) || oob == 0) {
		err = io.ErrShortWrite
	}
	return err
}

// end tells the process to end and waits for it.
func (p *process) end() {
	p.mu.Lock()
	p.closed = true
	_ = p.control.Close()
	p.mu.Unlock()
	late := time.NewTimer(endTime)
	defer late.Stop()
	select {
	case <-p.exited:
	case <-late.C:
		p.kill()
		<-p.exited
	}
}

func (p *process) kill() { _ = p.cmd.Process.Kill() } // an error: it has ended

// complaints logs what a process says on its standard error.
func (c *Client) complaints(from *os.File) {
	defer from.Close() //nolint:errcheck // it was read to its end
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, 4<<10)
	for n := 0; lines.Scan(); n++ {
		if n < maxComplaints {
			c.config.Logger.Warn("egress process says", "line", string(bytes.ToValidUTF8(lines.Bytes(), []byte("?"))))
		}
	}
	_, _ = io.Copy(io.Discard, from) // a line that is too long ends the scan, not the reading
}

// pair makes the two ends of a connection.
func pair() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	f := os.NewFile(uintptr(fds[0]), "egress")
	defer f.Close() //nolint:errcheck // the connection has its own
	theirs = os.NewFile(uintptr(fds[1]), "egress")
	for _, fd := range fds { // what waits in them is bounded, whatever net.core.wmem_default is
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, bufferSize); err != nil {
			_ = theirs.Close()
			return nil, nil, fmt.Errorf("socketpair: %w", err)
		}
	}
	conn, err := net.FileConn(f)
	if err != nil {
		_ = theirs.Close()
		return nil, nil, err
	}
	return conn.(*net.UnixConn), theirs, nil
}

// port is what a process connects to for a URL.
func port(u *url.URL) (uint16, error) {
	if text := u.Port(); text != "" {
		n, err := strconv.ParseUint(text, 10, 16)
		return uint16(n), err
	}
	if u.Scheme == "https" {
		return 443, nil
	}
	return 80, nil
}

// body tells when it is over.
type body struct {
	io.ReadCloser
	over func()
}

// Close implements io.Closer.
func (b *body) Close() error {
	defer b.over()
	return b.ReadCloser.Close()
}
