package fdkeeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/attach/packet"
)

const (
	// Patience is how long somebody may wait for a connection that nobody serves.
	Patience = 4 * time.Second
	// OpeningTime is how long after its claim a server that says that it is opening is let do so.
	OpeningTime = 30 * time.Second
	// Silence is how long a server may say nothing while somebody waits for it.
	Silence = 10 * time.Second
	// watchEvery is how often connections are looked at.
	watchEvery = 200 * time.Millisecond
	// endTime is how long a server may take to end when another one has claimed.
	endTime = 5 * time.Second
	// adoptTime is how long a server that lost its keeper may take to claim at a new one.
	adoptTime = 5 * time.Second
	// startTime is how long a new server may take until it claims.
	startTime = 15 * time.Second
	// lockName keeps a second keeper out of a directory.
	lockName = "keeper.lock"
)

// ExitReplaced is the exit code of a server that ended because another one has claimed, or
// because it was told to stop. 0 would mean that there is nothing to serve any more.
const ExitReplaced = 75

// Control ends connections and counts who waits for them (fuseserver.Control).
type Control interface {
	Waiting(minor uint32) (int, error)
	Abort(minor uint32) error
}

// Config is what a keeper needs.
type Config struct {
	// Dir is where its socket and its lock are; it must exist and belong to root alone.
	Dir string
	// Command starts a server; it is to claim within startTime. Env is its environment.
	Command, Env []string
	Control      Control
	Logger       *slog.Logger
	// Patience and Silence are for tests; 0 means the constants.
	Patience, Silence time.Duration
}

// entry is a connection.
type entry struct {
	name  string
	minor uint32
	blob  []byte
	dev   *os.File
	// served: the server of now answers it.
	served bool
	// waited is since when somebody waits for it and nobody serves it.
	waited time.Time
}

// session is a server that has claimed, or wants to.
type session struct {
	conn    *net.UnixConn
	pid     int
	pidfd   *os.File
	ended   chan struct{} // the process is gone
	claimed time.Time
	heard   time.Time // guarded by Keeper.mu
	opening bool      // it said so last; guarded by Keeper.mu
	busy    bool      // a call of it is under way; guarded by Keeper.mu
}

// Keeper is the process's state.
type Keeper struct {
	cfg    Config
	ns     *namespace
	wg     sync.WaitGroup
	cancel context.CancelFunc
	poke   chan struct{} // the supervisor shall look

	// claiming makes claims wait for each other.
	claiming sync.Mutex
	// mu guards the following; it is never held over calls that wait.
	mu      sync.Mutex
	entries map[string]*entry
	server  *session
	// lastClaim is the process that claimed last.
	lastClaim int
	command   []string
	renew     bool // start a server although one runs
}

// ErrTaken is returned when another keeper has the directory already.
var ErrTaken = errors.New("another keeper of mounts runs")

// Run keeps connections until ctx ends, or until the server has ended by its own will
// (exit code 0) and nothing is kept. ready is called when the keeper can be dialed. It
// returns ErrTaken at once if another keeper has the directory.
func Run(ctx context.Context, cfg Config, ready func()) error {
	if cfg.Patience == 0 {
		cfg.Patience = Patience
	}
	if cfg.Silence == 0 {
		cfg.Silence = Silence
	}
	lock, err := lockFile(filepath.Join(cfg.Dir, lockName))
	if err != nil {
		return err
	}
	if lock == nil {
		return ErrTaken
	}
	defer lock.Close() //nolint:errcheck // the lock ends with it
	ns, err := newNamespace(cfg.Dir)
	if err != nil {
		return err
	}
	defer ns.close()
	listener, err := packet.Listen(cfg.Dir, SocketName)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	k := &Keeper{cfg: cfg, ns: ns, cancel: cancel, poke: make(chan struct{}, 1), entries: map[string]*entry{}, command: cfg.Command}
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	defer stop()
	k.wg.Go(func() { k.supervise(ctx) })
	k.wg.Go(func() { k.watch(ctx) })
	ready()
	for {
		conn, err := listener.AcceptUnix()
		if err != nil {
			cancel()
			k.wg.Wait()
			k.release()
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("keeper's socket: %w", err)
		}
		k.wg.Go(func() { k.talk(ctx, conn) })
	}
}

// lockFile locks a file until it is closed; it returns nil if somebody else has it.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, f.Close()
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// release ends every connection; those that the server has too go on with it.
func (k *Keeper) release() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, e := range k.entries {
		_ = e.dev.Close()
	}
	k.entries = nil
}

// talk answers one peer.
func (k *Keeper) talk(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close() //nolint:errcheck // it was only answered
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	cred, err := packet.Peer(conn)
	if err != nil {
		k.cfg.Logger.Warn("stranger turned away from the keeper of mounts", "err", err)
		return
	}
	var own *session
	for {
		var m message
		files, err := packet.Receive(conn, &m)
		if err != nil {
			return
		}
		k.hear(own, true)
		answer, give := k.answer(ctx, conn, cred, &own, m, files)
		k.hear(own, false)
		err = packet.Send(conn, answer, give...)
		packet.CloseAll(files)
		packet.CloseAll(give)
		if err != nil {
			return
		}
	}
}

func (k *Keeper) hear(s *session, busy bool) {
	if s == nil {
		return
	}
	k.mu.Lock()
	s.heard, s.busy = time.Now(), busy
	k.mu.Unlock()
}

// answer does what a message asks. What it keeps of files, it copies; give is closed by
// the caller.
func (k *Keeper) answer(ctx context.Context, conn *net.UnixConn, cred *unix.Ucred, own **session, m message, files []*os.File) (message, []*os.File) {
	fail := func(err error) (message, []*os.File) {
		if errors.Is(err, ErrUnknown) {
			return message{NotFound: true}, nil
		}
		return message{Error: err.Error()}, nil
	}
	switch m.Op {
	case opList:
		return message{Names: k.names()}, nil
	case opRenew:
		return k.startNew(m.Command), nil
	case opClone:
		f, err := k.clone(m)
		if err != nil {
			return fail(err)
		}
		return message{}, []*os.File{f}
	case opClaim:
		if *own != nil {
			return fail(errors.New("claimed already"))
		}
		s, err := k.claim(ctx, conn, int(cred.Pid))
		if err != nil {
			return fail(err)
		}
		*own = s
		return message{Names: k.names()}, nil
	}
	k.mu.Lock()
	serving := *own != nil && k.server == *own
	k.mu.Unlock()
	if !serving {
		return fail(errors.New("claim first: another process is the server"))
	}
	switch m.Op {
	case opBeat, opOpening:
		k.mu.Lock()
		(*own).opening = m.Op == opOpening
		k.mu.Unlock()
		return message{}, nil
	case opFetch:
		e, dev, err := k.fetch(m.Name)
		if err != nil {
			return fail(err)
		}
		return e, []*os.File{dev}
	case opPut:
		if err := k.put(m, files); err != nil {
			return fail(err)
		}
	case opUpdate, opServing:
		if err := k.update(m); err != nil {
			return fail(err)
		}
	case opDrop:
		if err := k.drop(m.Name); err != nil {
			return fail(err)
		}
	default:
		return fail(fmt.Errorf("no such message: %.32q", m.Op))
	}
	return message{}, nil
}

func (k *Keeper) names() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := []string{}
	for name := range k.entries {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

func (k *Keeper) startNew(command []string) message {
	if len(command) == 0 || !filepath.IsAbs(command[0]) {
		return message{Error: "a server's command begins with an absolute path"}
	}
	k.mu.Lock()
	k.command, k.renew = slices.Clone(command), true
	k.mu.Unlock()
	k.wake()
	return message{}
}

func (k *Keeper) wake() {
	select {
	case k.poke <- struct{}{}:
	default:
	}
}

func (k *Keeper) clone(m message) (*os.File, error) {
	k.mu.Lock()
	_, ok := k.entries[m.Name]
	k.mu.Unlock()
	if !ok {
		return nil, ErrUnknown
	}
	return k.ns.clone(m.Name, m.ReadOnly)
}

func (k *Keeper) fetch(name string) (message, *os.File, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	e := k.entries[name]
	if e == nil {
		return message{}, nil, ErrUnknown
	}
	dev, err := duplicate(e.dev)
	if err != nil {
		return message{}, nil, err
	}
	return message{Minor: e.minor, Blob: slices.Clone(e.blob)}, dev, nil
}

func duplicate(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

func (k *Keeper) put(m message, files []*os.File) error {
	switch {
	case !validName(m.Name):
		return fmt.Errorf("not the name of a connection: %.80q", m.Name)
	case len(m.Blob) > MaxBlob:
		return fmt.Errorf("a blob of %d bytes, at most %d are kept", len(m.Blob), MaxBlob)
	case len(files) != 2:
		return fmt.Errorf("%d descriptors, want the device's and the tree's", len(files))
	}
	k.mu.Lock()
	_, taken := k.entries[m.Name]
	full := len(k.entries) >= MaxEntries
	k.mu.Unlock()
	if taken {
		return fmt.Errorf("connection %s is kept already", m.Name)
	}
	if full {
		return fmt.Errorf("%d connections are kept, as many as can be", MaxEntries)
	}
	dev, err := duplicate(files[0])
	if err != nil {
		return err
	}
	if err := k.ns.attach(m.Name, files[1]); err != nil {
		return errors.Join(err, dev.Close())
	}
	k.mu.Lock()
	k.entries[m.Name] = &entry{name: m.Name, minor: m.Minor, blob: slices.Clone(m.Blob), dev: dev}
	k.mu.Unlock()
	return nil
}

func (k *Keeper) update(m message) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	e := k.entries[m.Name]
	switch {
	case e == nil:
		return ErrUnknown
	case m.Op == opServing:
		e.served, e.waited = true, time.Time{}
	case len(m.Blob) > MaxBlob:
		return fmt.Errorf("a blob of %d bytes, at most %d are kept", len(m.Blob), MaxBlob)
	default:
		e.blob = slices.Clone(m.Blob)
	}
	return nil
}

func (k *Keeper) drop(name string) error {
	k.mu.Lock()
	e := k.entries[name]
	delete(k.entries, name)
	k.mu.Unlock()
	if e == nil {
		return ErrUnknown
	}
	// First the mount, whose last one flushes through the connection.
	return errors.Join(k.ns.detach(name), e.dev.Close())
}
