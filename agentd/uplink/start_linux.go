package uplink

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
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
	"github.com/postern-dev/postern/tunnel"
)

// Arg is the first argument of an uplink by default.
const Arg = "uplink"

// Limits.
const (
	maxConfig = 16 << 20 // bytes of a CarrierConfig
	// farewell is how long an uplink may take to send what is on the way when its
	// tunnel has ended; then it is killed. The uplink itself keeps to flushTime.
	farewell  = 4 * time.Second
	flushTime = 2 * time.Second
	// sendTime bounds what is said to an uplink.
	sendTime = 15 * time.Second
	// bufferSize is asked for as the buffers of a lane's connection, in bytes, each
	// way. The kernel counts twice that, with what it needs itself.
	bufferSize = 128 << 10
	// maxComplaints is how many lines of its standard error are logged.
	maxComplaints = 20
)

// UIDs is how far behind sql.uid_base the uplink's user id is: behind those of SQL
// sessions, of agentd doctor's and of the parser.
const UIDs = 65_536 + 256 + 2

// Config is how uplinks are run.
type Config struct {
	// Executable is agentd's own; "" means /proc/self/exe. Args are its arguments;
	// nil means Arg alone.
	Executable string
	Args       []string
	// UID is the user and group id that an uplink gets when agentd is root. It must
	// not be 0 then.
	UID uint32
	// OuterCAs are trusted for the outer TLS beside the system's, in DER.
	OuterCAs [][]byte
	// Logger is optional; nil discards.
	Logger *slog.Logger
}

// Starter starts uplinks. It is safe for concurrent use.
type Starter struct {
	config   Config
	farewell time.Duration
	wg       sync.WaitGroup
}

// New makes a Starter; end it with Close.
func New(config Config) *Starter {
	if config.Executable == "" {
		config.Executable = "/proc/self/exe"
	}
	if config.Args == nil {
		config.Args = []string{Arg}
	}
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	return &Starter{config: config, farewell: farewell}
}

// Close waits for the uplinks to end, each of which its tunnel has closed before.
// That takes farewell at most.
func (s *Starter) Close() { s.wg.Wait() }

// process is one uplink: the tunnel.Carrier of one tunnel.
type process struct {
	starter *Starter
	cmd     *exec.Cmd
	pid     int
	exited  chan struct{} // closed when the process is gone and waited for

	mu      sync.Mutex // held while something is sent
	control *net.UnixConn
	closed  bool
	late    *time.Timer
}

var _ tunnel.Carrier = (*process)(nil)

// Carrier starts an uplink for one tunnel. It is for tunnel.DialConfig.
func (s *Starter) Carrier(c tunnel.CarrierConfig) (tunnel.Carrier, error) {
	c.OuterCAs = s.config.OuterCAs
	p, err := s.start(c)
	if err != nil {
		return nil, fmt.Errorf("start the uplink process: %w", err)
	}
	return p, nil
}

func (s *Starter) start(c tunnel.CarrierConfig) (p *process, err error) {
	environment := environment()
	said, err := json.Marshal(config{c, environment})
	if err != nil {
		return nil, err
	}
	defer clear(said) // the proxy's password
	if len(said) > maxConfig {
		return nil, fmt.Errorf("the CA certificates take more than %d bytes", maxConfig)
	}
	if err := confine.CloseOnExec(); err != nil {
		return nil, fmt.Errorf("close_range: %w", err)
	}
	ours, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close() //nolint:errcheck // the process has it, or nobody
	control, err := net.FileConn(ours)
	_ = ours.Close()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = control.Close()
		}
	}()
	complaints, theirComplaints, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirComplaints.Close() //nolint:errcheck // as above
	defer func() {
		if err != nil {
			_ = complaints.Close()
		}
	}()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0) // here: the thread that starts the process may not
	if err != nil {
		return nil, err
	}
	defer null.Close() //nolint:errcheck // as above
	cmd := &exec.Cmd{
		Path: s.config.Executable, Args: append([]string{"agentd"}, s.config.Args...),
		Env: []string{}, Dir: "/", Stdin: null, Stdout: null, Stderr: theirComplaints, ExtraFiles: []*os.File{theirs},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL},
	}
	if os.Geteuid() == 0 {
		if s.config.UID == 0 {
			return nil, errors.New("it has no user id")
		}
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: s.config.UID, Gid: s.config.UID}
	}
	p = &process{starter: s, cmd: cmd, control: control.(*net.UnixConn), exited: make(chan struct{})}
	err = confine.Start(cmd, confine.Confinement{Executable: s.config.Executable, Ports: ports(c), Readable: readable(environment), Ended: p.exited})
	if err != nil {
		return nil, err
	}
	p.pid = cmd.Process.Pid
	s.wg.Go(func() { s.complaints(complaints) })
	s.wg.Go(func() {
		_ = cmd.Wait() // the state says more
		p.ended()
	})
	if err := p.say(append(binary.BigEndian.AppendUint32(nil, uint32(len(said))), said...), nil); err != nil {
		p.Close(true)
		return nil, err
	}
	return p, nil
}

// ended notes that the process is gone.
func (p *process) ended() {
	close(p.exited)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.late != nil {
		p.late.Stop()
	}
	if !p.closed {
		p.starter.config.Logger.Warn("uplink ended", "pid", p.pid, "status", p.cmd.ProcessState.String())
	}
	_ = p.control.Close()
}

// Open implements tunnel.Carrier.
func (p *process) Open(ctx context.Context) (net.Conn, error) {
	ours, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close() //nolint:errcheck // the process has its own
	conn, err := net.FileConn(ours)
	_ = ours.Close()
	if err != nil {
		return nil, err
	}
	if err = context.Cause(ctx); err == nil {
		err = p.say([]byte{'c'}, theirs)
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("the uplink process is gone: %w", err)
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

// Close implements tunnel.Carrier.
func (p *process) Close(lost bool) {
	if lost {
		_ = p.cmd.Process.Kill() // an error: it has ended
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.closed = true
	_ = p.control.Close()
	select {
	case <-p.exited:
	default:
		p.late = time.AfterFunc(p.starter.farewell, func() { _ = p.cmd.Process.Kill() })
	}
}

// complaints logs what an uplink says on its standard error.
func (s *Starter) complaints(from *os.File) {
	defer from.Close() //nolint:errcheck // it was read to its end
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, 4<<10)
	for n := 0; lines.Scan(); n++ {
		if n < maxComplaints {
			s.config.Logger.Warn("uplink says", "line", string(bytes.ToValidUTF8(lines.Bytes(), []byte("?"))))
		}
	}
	_, _ = io.Copy(io.Discard, from) // a line that is too long ends the scan, not the reading
}

// pair makes the two ends of a connection.
func pair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	for _, fd := range fds { // what waits in them is bounded, whatever net.core.wmem_default is
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, bufferSize); err != nil {
			_ = unix.Close(fds[0])
			_ = unix.Close(fds[1])
			return nil, nil, fmt.Errorf("socketpair: %w", err)
		}
	}
	return os.NewFile(uintptr(fds[0]), "uplink"), os.NewFile(uintptr(fds[1]), "uplink"), nil
}

// config is what an uplink is told first.
type config struct {
	tunnel.CarrierConfig
	Environment map[string]string `json:"environment,omitempty"` // of inheritedVariables
}

// inheritedVariables are what of agentd's environment means something to an uplink,
// which has none of its own: where the system's CA certificates are.
var inheritedVariables = []string{"SSL_CERT_FILE", "SSL_CERT_DIR"}

func environment() map[string]string {
	env := map[string]string{}
	for _, name := range inheritedVariables {
		if value := os.Getenv(name); value != "" {
			env[name] = value
		}
	}
	return env
}

// ports are those that the uplink of c may connect to, beside DNS.
func ports(c tunnel.CarrierConfig) []uint16 {
	out := []uint16{}
	for _, text := range []string{c.URL, c.Proxy} {
		u, err := url.Parse(text)
		if text == "" || err != nil {
			continue
		}
		if n, err := strconv.ParseUint(u.Port(), 10, 16); err == nil {
			out = append(out, uint16(n))
			continue
		}
		switch u.Scheme {
		case "wss", "https":
			out = append(out, 443)
		default:
			out = append(out, 80)
		}
	}
	return out
}

// readable are the files and directories that env names.
func readable(env map[string]string) []string {
	var out []string
	for _, value := range env {
		out = append(out, filepath.SplitList(value)...) // SSL_CERT_DIR is a list
	}
	return out
}
