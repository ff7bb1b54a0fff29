package sqlsession

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/confine"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/child"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
)

// ParserArg is the first argument of a parser process by default.
const ParserArg = "sql-parser"

// ParserMain is the main of a parser process; it returns the exit code. agentd's
// main calls it before anything else when os.Args[1] is ParserArg.
func ParserMain() int { return child.ParserMain() }

// Back-off between starts of a parser process that does not live; it counts as
// well again after parserWell.
const (
	parserPause    = 200 * time.Millisecond
	parserMaxPause = 10 * time.Second
	parserWell     = 30 * time.Second
	// parserUIDs is how far behind the user ids of sessions those of a Manager's
	// own Parser are: agentd doctor's sessions are between them.
	parserUIDs = 256
	// parserIdle is how long the parser of large texts is kept without one.
	parserIdle = 10 * time.Minute
)

// ParserConfig is how parser processes are run.
type ParserConfig struct {
	// Executable and Args are those of Config; nil Args mean ParserArg alone.
	Executable string
	Args       []string
	// UID is the first of two user and group ids that the processes get when we
	// are root; 0 means 1,900,065,792, behind those of SQL sessions and of
	// agentd doctor.
	UID int
	// Logger is optional; nil discards. Metrics is optional.
	Logger  *slog.Logger
	Metrics *Metrics
}

// Parser keeps the processes that parse statements for SQL sessions: one for
// small texts, and while it is needed one for large texts. Each takes about
// 50 MB, and a second of a processor and 260 MB to start. It is safe for
// concurrent use and may serve several Managers.
type Parser struct {
	config ParserConfig
	wg     sync.WaitGroup
	lanes  map[pgtree.Lane]*parserLane

	mu     sync.Mutex // guards what follows and the fields of lanes
	closed bool
	soon   bool // StartSoon was called
	stop   chan struct{}
	served map[*net.UnixConn]bool // introducers
}

// parserLane is one parser and its process, if it has one; under Parser.mu.
type parserLane struct {
	lane    pgtree.Lane
	control *net.UnixConn // nil: no process
	cmd     *exec.Cmd
	started time.Time
	asked   time.Time
	pause   time.Duration // before the next start
	next    time.Time     // no start before
}

// NewParser makes a Parser without processes; they start when they are needed,
// or with Start. End it with Close.
func NewParser(config ParserConfig) *Parser {
	if config.Executable == "" {
		config.Executable = "/proc/self/exe"
	}
	if config.Args == nil {
		config.Args = []string{ParserArg}
	}
	if config.UID == 0 {
		config.UID = 1_900_065_792
	}
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	if config.Metrics == nil {
		config.Metrics = NewMetrics(nil)
	}
	p := &Parser{config: config, lanes: make(map[pgtree.Lane]*parserLane), stop: make(chan struct{}), served: make(map[*net.UnixConn]bool)}
	for _, lane := range pgtree.Lanes {
		p.lanes[lane] = &parserLane{lane: lane}
	}
	return p
}

// Start starts the parser of small texts, if it does not run, and keeps it
// running. It returns at once; statements wait until it is ready.
func (p *Parser) Start() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		_ = p.ensureLocked(p.lanes[pgtree.Small])
	}
}

// parserDelay is how long StartSoon waits: agentd's start has other work, and
// many a start is followed by an end.
const parserDelay = 3 * time.Second

// StartSoon does what Start does, a few seconds later unless a session needs the
// parser before.
func (p *Parser) StartSoon() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.soon {
		return
	}
	p.soon = true
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		select {
		case <-p.stop:
		case <-time.After(parserDelay):
			p.Start()
		}
	}()
}

// Close ends the processes and waits for them. Statements that are being looked
// at fail with UNAVAILABLE. It may be called again.
func (p *Parser) Close() {
	p.mu.Lock()
	if !p.closed {
		p.closed = true
		close(p.stop)
	}
	for _, l := range p.lanes {
		if l.cmd != nil {
			_ = l.cmd.Process.Kill()
		}
	}
	for conn := range p.served {
		_ = conn.Close()
	}
	p.mu.Unlock()
	p.wg.Wait()
}

// introducer makes the socket over which a session's process gets its
// connections: the session's end. The caller closes it.
func (p *Parser) introducer() (*os.File, error) {
	ours, theirs, err := socketPair("sql parser")
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		_ = ours.Close()
		return theirs, nil // it says so by being closed
	}
	p.served[ours] = true
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		p.introduce(ours)
		_ = ours.Close()
		p.mu.Lock()
		delete(p.served, ours)
		p.mu.Unlock()
	}()
	return theirs, nil
}

// introduce answers one session until it ends.
func (p *Parser) introduce(conn *net.UnixConn) {
	var b [1]byte
	for {
		if _, err := io.ReadFull(conn, b[:]); err != nil {
			return
		}
		l := p.lanes[pgtree.Lane(b[0])]
		if l == nil {
			return
		}
		f, err := p.connect(l)
		if err != nil {
			p.config.Logger.Warn("no sql parser", "lane", l.lane.String(), "err", err)
			err = pgtree.SendFile(conn, pgtree.NoParser, nil)
		} else {
			err = pgtree.SendFile(conn, pgtree.Introduced, f)
			_ = f.Close()
		}
		if err != nil {
			return
		}
	}
}

// connect makes a connection to a lane's parser and returns the session's end.
func (p *Parser) connect(l *parserLane) (*os.File, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	theirs, parsers := os.NewFile(uintptr(pair[0]), "sql parser"), os.NewFile(uintptr(pair[1]), "sql parser")
	defer func() { _ = parsers.Close() }()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		_ = theirs.Close()
		return nil, ErrClosed
	}
	l.asked = time.Now()
	if err := p.ensureLocked(l); err != nil {
		_ = theirs.Close()
		return nil, err
	}
	// The process takes these as soon as it is ready; until then they wait in
	// the socket's buffer, which holds hundreds.
	_ = l.control.SetWriteDeadline(time.Now().Add(sendTimeout))
	if err := pgtree.SendFile(l.control, 'c', parsers); err != nil {
		_ = theirs.Close()
		return nil, err
	}
	return theirs, nil
}

// errPause is returned while a parser that died again and again rests.
var errPause = errors.New("the parser of statements ended several times: it is started again soon")

// ensureLocked starts the lane's process if there is none.
func (p *Parser) ensureLocked(l *parserLane) error {
	if l.control != nil {
		return nil
	}
	if time.Now().Before(l.next) {
		return errPause
	}
	ours, theirs, err := socketPair("sql parser")
	if err != nil {
		return err
	}
	defer func() { _ = theirs.Close() }()
	cmd, stderr, release, err := command(p.config.Executable, p.config.Args, theirs)
	if err != nil {
		_ = ours.Close()
		return err
	}
	defer release()
	if os.Geteuid() == 0 {
		id := uint32(p.config.UID)
		if l.lane == pgtree.Large {
			id++
		}
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: id, Gid: id}
	}
	if err := confine.Start(cmd, confine.Confinement{Executable: p.config.Executable, Offline: true}); err != nil {
		_ = ours.Close()
		_ = stderr.Close()
		return fmt.Errorf("start the parser process: %w", err)
	}
	l.control, l.cmd, l.started = ours, cmd, time.Now()
	p.config.Metrics.parserStarts.WithLabelValues(l.lane.String()).Inc()
	p.wg.Add(3)
	go func() {
		defer p.wg.Done()
		logLines(stderr, func(line string) {
			p.config.Logger.Warn("sql parser says", "lane", l.lane.String(), "line", line)
		})
	}()
	go func() {
		defer p.wg.Done()
		p.count(ours, l.lane)
	}()
	go func() {
		defer p.wg.Done()
		p.await(l, cmd, ours)
	}()
	return nil
}

// count adds up what a process tells of itself.
func (p *Parser) count(control *net.UnixConn, lane pgtree.Lane) {
	var (
		b           [pgtree.StatsSize]byte
		texts, took uint64
	)
	for {
		if _, err := io.ReadFull(control, b[:]); err != nil {
			return
		}
		n, nanos := binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint64(b[8:])
		if n < texts || nanos < took {
			continue
		}
		p.config.Metrics.parses.WithLabelValues(lane.String()).Add(float64(n - texts))
		p.config.Metrics.parseSeconds.WithLabelValues(lane.String()).Add(float64(nanos-took) / 1e9)
		texts, took = n, nanos
	}
}

// await waits for a process to end, ends it when the lane is idle, and starts
// the next one of small texts.
func (p *Parser) await(l *parserLane, cmd *exec.Cmd, control *net.UnixConn) {
	ended := make(chan struct{})
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		_ = cmd.Wait()
		close(ended)
	}()
	tick := time.NewTicker(parserIdle / 4)
	defer tick.Stop()
	for alive := true; alive; {
		select {
		case <-ended:
			alive = false
		case now := <-tick.C:
			p.mu.Lock()
			idle := l.lane == pgtree.Large && now.Sub(l.asked) > parserIdle
			p.mu.Unlock()
			if idle {
				// Sessions that are connected ask for another when they need
				// one.
				_ = cmd.Process.Kill()
			}
		}
	}
	_ = control.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	lived := time.Since(l.started)
	l.control, l.cmd = nil, nil
	if p.closed {
		return
	}
	if lived > parserWell {
		l.pause = 0
	}
	l.next = time.Now().Add(l.pause)
	wait := l.pause
	l.pause = min(max(2*l.pause, parserPause), parserMaxPause)
	if l.lane == pgtree.Large {
		return // when it is needed
	}
	p.config.Logger.Warn("sql parser ended: starting another", "lane", l.lane.String(), "status", cmd.ProcessState.String(), "duration_seconds", lived.Seconds())
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		select {
		case <-p.stop:
			return
		case <-time.After(wait):
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.closed {
			return
		}
		if err := p.ensureLocked(l); err != nil {
			p.config.Logger.Error("cannot start the sql parser", "err", err)
		}
	}()
}

// socketPair makes our end and that of a process to be started.
func socketPair(name string) (ours *net.UnixConn, theirs *os.File, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	f := os.NewFile(uintptr(pair[0]), name)
	conn, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		_ = unix.Close(pair[1])
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	return conn.(*net.UnixConn), os.NewFile(uintptr(pair[1]), name), nil
}

// command prepares a process of ours: no environment, and of descriptors only
// files, from 3 on. The caller reads and closes stderr, and calls release once the
// process has started, or if it shall not.
func command(executable string, args []string, files ...*os.File) (cmd *exec.Cmd, stderr *os.File, release func(), err error) {
	if err := confine.CloseOnExec(); err != nil {
		return nil, nil, nil, fmt.Errorf("close_range: %w", err)
	}
	stderr, theirs, err := os.Pipe()
	if err != nil {
		return nil, nil, nil, fmt.Errorf("pipe: %w", err)
	}
	// Opened here: the thread that starts the process may not.
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		_ = stderr.Close()
		_ = theirs.Close()
		return nil, nil, nil, err
	}
	cmd = &exec.Cmd{
		Path:        executable,
		Args:        append([]string{"agentd"}, args...),
		Env:         []string{},
		Dir:         "/",
		Stdin:       null,
		Stdout:      null,
		Stderr:      theirs,
		ExtraFiles:  files,
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	return cmd, stderr, func() { _ = null.Close(); _ = theirs.Close() }, nil
}

// logLines hands the lines of a process's complaints on, maxStderr of them at
// most, until it closes its standard error.
func logLines(stderr *os.File, log func(line string)) {
	defer func() { _ = stderr.Close() }()
	lines := bufio.NewScanner(stderr)
	lines.Buffer(nil, 4<<10)
	for n := 0; lines.Scan(); n++ {
		if n < maxStderr {
			log(lines.Text())
		}
	}
	// A line that is too long ends the scan, not the reading.
	_, _ = io.Copy(io.Discard, stderr)
}
