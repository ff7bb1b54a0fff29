package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/agentd/kernel/internal/journal"
	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Times that things may take.
const (
	startTime = 60 * time.Second // a sandbox's start
	killTime  = 20 * time.Second // its end
)

// ownPrefix begins the sessions of shims' own messages.
const ownPrefix = "postern-shim-"

var errStopped = proto.Errorf(proto.CodeUnavailable, "the kernel is being stopped")

// Shim is a running shim. Open makes it, Serve serves, Close lets go: of the process,
// never of the kernel.
type Shim struct {
	criu    CRIU
	dir     string
	logger  *slog.Logger
	lock    *os.File
	journal *journal.Journal
	// self is the session of our own messages to the kernel.
	self string

	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup

	secrets keeper
	cleaner cleaner

	queues map[string]*queue // shell, control, stdin

	// restoring is held while processes are restored; taken before life.
	restoring sync.Mutex
	// life serialises start, restart, stop, quiesce, resume; taken before mu.
	life sync.Mutex

	// mu guards the following; held for memory alone.
	mu      sync.Mutex
	spec    Spec
	state   State
	box     *sandbox.Sandbox
	link    *link
	phase   posternv1.KernelState
	reason  string
	quiet   bool        // quiesced
	filling *filling    // of box, or of the one before; nil: none
	notice  string      // of the last restore, see posternv1.Kernel
	stay    *time.Timer // lets a kernel go on that was left stopped; nil: none is
	stopped bool
	active  time.Time
	clients map[string]*client
	// known are the ids of the messages that clients sent last, and knownOrder the same,
	// the oldest first.
	known      map[string]struct{}
	knownOrder []string
	requests   map[string]*request
	// undone are requests that have their reply, and of which the kernel has not said that
	// it is done with them; at most maxUndone.
	undone  map[string]*request
	order   uint64 // of the newest request
	drops   uint64 // messages of the kernel that were no messages, or for nobody
	changed chan struct{}
	// watchers are the agentds that watch, one at most but for moments; watched is when the
	// last one left, or the shim began.
	watchers int
	watched  time.Time
	finished chan struct{} // closed by Stop
}

// Open opens a kernel's directory and adopts, or starts, its kernel. A kernel that
// died meanwhile is no error. It makes no checkpoints: see OpenWith.
func Open(ctx context.Context, dir string, logger *slog.Logger) (*Shim, error) {
	return OpenWith(ctx, dir, logger, nil)
}

// OpenWith is Open with what checkpoints need; nil means none are made.
func OpenWith(ctx context.Context, dir string, logger *slog.Logger, criu CRIU) (*Shim, error) {
	return openWith(ctx, dir, logger, criu, Secrets{})
}

// openWith is OpenWith for a kernel that has secrets.
func openWith(ctx context.Context, dir string, logger *slog.Logger, criu CRIU, secrets Secrets) (*Shim, error) {
	spec, err := ReadSpec(dir)
	if err != nil {
		return nil, err
	}
	s := &Shim{
		criu: criu, dir: dir, logger: logger, spec: spec, self: ownPrefix + jupyter.NewID(), queues: map[string]*queue{},
		clients: map[string]*client{}, known: map[string]struct{}{}, requests: map[string]*request{}, undone: map[string]*request{}, changed: make(chan struct{}), finished: make(chan struct{}),
		active: time.Now(), watched: time.Now(), phase: posternv1.KernelState_KERNEL_STATE_STARTING,
	}
	if len(secrets.Current)+len(secrets.Old) > 0 {
		protect()
		s.secrets.put(secrets)
	}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	if s.lock, err = os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	if err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = s.lock.Close()
		return nil, fmt.Errorf("another shim has %s", dir)
	}
	if err := s.open(ctx); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Shim) open(ctx context.Context) error {
	if err := readJSON(filepath.Join(s.dir, stateFile), &s.state); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var found journal.Recovery
	var err error
	s.journal, found, err = journal.Open(journal.Config{Dir: filepath.Join(s.dir, journalDir), MaxBytes: s.spec.JournalBytes, Logger: s.logger})
	if err != nil {
		return err
	}
	for _, r := range found.Requests {
		s.requests[r.ID] = &request{Request: r}
		s.state.Epoch = max(s.state.Epoch, r.Epoch) // a disk that was full may have kept it from the state
	}
	for _, name := range []string{jupyter.Shell, jupyter.Control, jupyter.Stdin} {
		q := newQueue()
		s.queues[name] = q
		s.wg.Go(func() { s.send(name, q) })
	}
	if err := errors.Join(s.readAsked(), s.readWaiting()); err != nil { // the kernel is worth more than what it was to be told
		s.logger.Error("messages that waited during a move are lost", "err", err)
	}
	s.wg.Go(s.watchRequests)
	s.life.Lock()
	defer s.life.Unlock()
	if err := s.recover(ctx); err != nil {
		return fmt.Errorf("clear away what an earlier shim left: %w", err)
	}
	switch {
	case s.state.Suspended:
		s.setPhase(posternv1.KernelState_KERNEL_STATE_SUSPENDED, "")
	case s.state.Dead != "":
		s.setPhase(posternv1.KernelState_KERNEL_STATE_DEAD, s.state.Dead)
	case s.state.Generation > 0:
		return s.adopt(ctx)
	default:
		return s.start(ctx)
	}
	return nil
}

// adopt takes over the kernel that an earlier shim left.
func (s *Shim) adopt(ctx context.Context) error {
	spec := s.spec.Sandbox
	if s.state.Sandbox != nil {
		spec = *s.state.Sandbox
	}
	filling, lost := s.unfilled(ctx)
	if lost != nil {
		if err := sandbox.Cleanup(ctx, spec); err != nil { // before it says anything
			return err
		}
		return s.died(nil, s.lost(lost))
	}
	box, err := sandbox.Adopt(ctx, spec, 0)
	if errors.Is(err, sandbox.ErrGone) {
		if cerr := sandbox.Cleanup(ctx, spec); cerr != nil {
			s.logger.Error("remains of a kernel not cleaned up", "err", cerr)
		}
		return s.died(nil, "it ended while nobody watched: the host was restarted, or the kernel was killed")
	}
	if err != nil {
		return fmt.Errorf("adopt the kernel: %w", err)
	}
	s.logger.Info("kernel adopted", "pid", box.PID())
	if s.criu != nil { // a shim that ended in the midst of a suspend left it stopped
		s.criu.Continue(box.PID())
	}
	if filling != nil {
		s.fill(box, filling)
	}
	now := box.Spec()
	s.mu.Lock()
	s.box = box
	s.state.Sandbox = &now
	s.state.Epoch++
	s.mu.Unlock()
	if err := s.saveState(); err != nil { // a full disk must not keep it from being used
		s.logger.Error("state not saved", "err", err)
	}
	s.follow(box)
	return nil
}

// Reread takes a spec that agentd has changed: who owns the kernel, and its id.
func (s *Shim) Reread() error {
	spec, err := ReadSpec(s.dir)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.spec.ID, s.spec.Owner, s.spec.Created = spec.ID, spec.Owner, spec.Created
	s.mu.Unlock()
	s.touch()
	s.signal()
	return nil
}

func (s *Shim) saveState() error {
	s.mu.Lock()
	state := s.state
	s.mu.Unlock()
	return writeJSON(filepath.Join(s.dir, stateFile), state)
}

// setPhase changes the state that everybody is told.
func (s *Shim) setPhase(phase posternv1.KernelState, reason string) {
	s.mu.Lock()
	same := s.phase == phase && s.reason == reason
	s.phase, s.reason = phase, reason
	s.mu.Unlock()
	if !same {
		s.signal()
	}
}

// signal wakes those who watch the state.
func (s *Shim) signal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *Shim) touch() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.active = time.Now()
}

// Kernel is the kernel as it is, and a channel that is closed when it changes.
func (s *Shim) Kernel() (*posternv1.Kernel, <-chan struct{}) {
	last := s.journal.Last()
	s.mu.Lock()
	defer s.mu.Unlock()
	k := &posternv1.Kernel{
		Id: s.spec.ID, Spec: s.spec.Name, Language: s.spec.Language, State: s.phase, Reason: s.reason,
		LastActivity: timestamppb.New(s.active), Sequence: last, Generation: s.state.Generation, Checkpoint: s.state.Checkpoint, Notice: s.notice,
	}
	for _, b := range s.spec.Sandbox.Binds {
		if workspace, ok := strings.CutPrefix(b.Target, WorkInside); ok {
			k.Mounts = append(k.Mounts, &posternv1.KernelMount{Workspace: workspace, ReadOnly: b.ReadOnly})
		}
	}
	if m := s.state.Move; m != nil {
		k.Move = &posternv1.KernelMove{Id: m.ID, To: m.To, Sent: m.Sent}
		if k.Reason == "" {
			k.Reason = "it is being moved to another host"
		}
	}
	if !s.state.Started.IsZero() {
		k.Started = timestamppb.New(s.state.Started)
	}
	for _, c := range s.clients {
		if c.stream != nil {
			k.Connections++
		}
	}
	if len(s.spec.Owner) > 0 {
		owner := &posternv1.Principal{}
		if protojson.Unmarshal(s.spec.Owner, owner) == nil {
			k.Owner = owner
		}
	}
	for _, m := range s.spec.Mounts {
		k.Mounts = append(k.Mounts, &posternv1.KernelMount{Workspace: m.Workspace, ReadOnly: m.ReadOnly})
	}
	return k, s.changed
}

// say journals a message of our own to everybody on iopub.
func (s *Shim) say(kind string, content any) {
	m, err := jupyter.New(jupyter.IOPub, kind, s.self, content)
	if err == nil {
		_, err = s.journal.Append("", m)
	}
	if err != nil {
		s.logger.Error("message of the shim's own not kept", "kind", kind, "err", err)
	}
}

// Close ends the shim's part; the kernel goes on.
func (s *Shim) Close() {
	s.cancel(errStopped)
	s.life.Lock()
	s.disconnect()
	s.mu.Lock()
	box := s.box
	s.box = nil
	for _, c := range s.clients {
		c.hangUpLocked()
	}
	s.mu.Unlock()
	s.life.Unlock()
	for _, q := range s.queues {
		q.close()
	}
	if s.journal != nil {
		s.flushHeld()
		if err := s.journal.Close(); err != nil {
			s.logger.Error("journal not closed", "err", err)
		}
	}
	s.wg.Wait()
	if box != nil {
		box.Close()
	}
	_ = s.lock.Close()
}

// writeConnection writes the connection file into the kernel's run directory. What an
// earlier kernel left there is not trusted.
func (s *Shim) writeConnection() error {
	spec := s.spec.Sandbox
	if err := os.Mkdir(spec.RunDir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	root, err := os.OpenRoot(spec.RunDir)
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // it was read
	for _, name := range []string{connectFile, socketName(1), socketName(2), socketName(3), socketName(4), socketName(5)} {
		if err := root.RemoveAll(name); err != nil {
			return err
		}
	}
	c := s.connection(sandbox.RunInside)
	text, err := c.Encode()
	if err != nil {
		return err
	}
	f, err := root.OpenFile(connectFile, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Chown(int(spec.UID), int(spec.GID)), f.Close())
}

func socketName(port int) string { return fmt.Sprintf("%s-%d", socketStem, port) }

func (s *Shim) connection(run string) jupyter.Connection {
	s.mu.Lock()
	defer s.mu.Unlock()
	return jupyter.Connection{
		Transport: "ipc", IP: filepath.Join(run, socketStem), ShellPort: 1, IOPubPort: 2, StdinPort: 3, ControlPort: 4, HeartbeatPort: 5,
		SignatureScheme: jupyter.Scheme, Key: s.state.Key, KernelName: s.spec.Name,
	}
}

func oneLine(text string) string {
	b, _ := json.Marshal(text) //nolint:errchkjson // a string has a JSON
	if len(b) == len(text)+2 {
		return text
	}
	return proto.Errorf(proto.CodeInternal, "%s", text).Message
}

// listen makes the socket. The path may be longer than a socket's address.
func listen(dir string) (net.Listener, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close() //nolint:errcheck // the socket is made
	path := fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), socketFile)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	return l, nil
}
