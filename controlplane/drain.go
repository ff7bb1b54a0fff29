package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

const (
	// moveEach spaces the agents of a replica that stops, moveSpread bounds the whole:
	// a fleet must not knock at the others at once.
	moveEach   = 2 * time.Millisecond
	moveSpread = 20 * time.Second
	// settleTime is how long agents may take to move once they have been told to.
	settleTime = 10 * time.Second
	// lastCalls is how long connections that are kept are still served after no new
	// ones are taken: each answer tells the load balancer to open another one.
	lastCalls = time.Second
	// cutTime is how long requests may take to end that were cut.
	cutTime = 3 * time.Second
)

// drain lets requests under way end. With other replicas nothing is refused: agents
// move there first, then new connections go there, then what is under way ends.
func (s *Server) drain() {
	s.notify(daemon.SdNotifyStopping)
	s.draining.Store(true)
	s.log.Info("control plane draining", "agents", s.hub.Online(), "queries", s.queries.Running(), "sessions", s.pg.Sessions())
	time.Sleep(s.options.DrainDelay)
	ctx, cancel := context.WithTimeout(context.Background(), s.options.DrainTimeout)
	defer cancel()
	if s.replicas != nil {
		s.replicas.beat(ctx) // others may have come or gone this moment
	}
	if s.replicas == nil || s.replicas.alone() {
		s.notebooks.Close() // while kernels that must end with it can be reached
		s.refusing.Store(true)
		s.hub.Drain(time.Second, 0, s.options.DrainTimeout)
	} else {
		s.moveAgents(ctx)
		s.listener.StopAccepting()
		s.notebooks.Close()
		pause(ctx, lastCalls)
	}
	s.jupyter.Close() // its clients come back by themselves, to whoever serves then
	sessions := make(chan struct{})
	go func() {
		defer close(sessions)
		if err := s.pg.Drain(ctx); err != nil {
			s.pg.Close()
		}
	}()
	if err := s.http.Shutdown(ctx); err != nil {
		s.refusing.Store(true)
		s.queries.CancelAll(errDraining)
		ctx, cancel := context.WithTimeout(context.Background(), cutTime)
		defer cancel()
		s.http.Shutdown(ctx) //nolint:errcheck // Close follows
	}
	s.refusing.Store(true)
	s.http.Close() //nolint:errcheck // nothing is left to lose
	<-sessions
	if s.replicas != nil {
		s.replicas.moveLanes(ctx)
		// What other replicas have under way on tunnels that are still here.
		for s.hub.Busy() && ctx.Err() == nil {
			pause(ctx, 20*time.Millisecond)
		}
		s.replicas.shutdown(ctx)
	}
}

// moveAgents asks the agents to go to other replicas and waits for it.
func (s *Server) moveAgents(ctx context.Context) {
	n := s.hub.Online()
	spread := min(time.Duration(n)*moveEach, moveSpread, s.options.DrainTimeout/2)
	s.hub.Drain(0, spread, s.options.DrainTimeout)
	ctx, cancel := context.WithTimeout(ctx, spread+settleTime)
	defer cancel()
	for !s.hub.Settled() && ctx.Err() == nil {
		pause(ctx, 20*time.Millisecond)
	}
	s.log.Info("agents told to move have moved", "agents", n, "left", s.hub.Online())
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// lastAnswers has clients open new connections while this replica drains: those that a
// load balancer keeps would else be closed under a request.
func (s *Server) lastAnswers(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.replicas != nil && s.draining.Load() {
			w.Header().Set("Connection", "close")
		}
		next.ServeHTTP(w, r)
	})
}

// drainingListener is a TCP listener that can stop to take connections without dropping
// those that the kernel has taken already: closing it would reset them.
type drainingListener struct {
	net.Listener
	mu      sync.Mutex
	stopped bool
	waiting []net.Conn // what StopAccepting found
	wake    chan struct{}
	closed  chan struct{}
	once    sync.Once
}

func newDrainingListener(l net.Listener) *drainingListener {
	return &drainingListener{Listener: l, wake: make(chan struct{}), closed: make(chan struct{})}
}

// Accept returns the next connection; after StopAccepting those that were waiting, then
// it blocks until Close.
func (l *drainingListener) Accept() (net.Conn, error) {
	for {
		l.mu.Lock()
		if len(l.waiting) > 0 {
			conn := l.waiting[0]
			l.waiting = l.waiting[1:]
			l.mu.Unlock()
			return conn, nil
		}
		stopped := l.stopped
		l.mu.Unlock()
		if stopped {
			<-l.closed
			return nil, net.ErrClosed
		}
		conn, err := l.Listener.Accept()
		if err == nil || !errors.Is(err, net.ErrClosed) {
			return conn, err
		}
		select { // closed by StopAccepting, or by Close
		case <-l.wake:
		case <-l.closed:
			return nil, err
		}
	}
}

// StopAccepting refuses connections from now on. It may be called once.
func (l *drainingListener) StopAccepting() {
	var conns []net.Conn
	if tcp, ok := l.Listener.(*net.TCPListener); ok {
		if raw, err := tcp.SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) { conns = acceptAll(int(fd)) }) //nolint:errcheck // the listener is being closed either way
		}
	}
	l.Listener.Close() //nolint:errcheck // likewise
	l.mu.Lock()
	l.waiting, l.stopped = conns, true
	l.mu.Unlock()
	close(l.wake)
}

// acceptAll takes what waits in a listening socket's queue.
func acceptAll(fd int) (conns []net.Conn) {
	for {
		one, _, err := unix.Accept4(fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return conns
		}
		file := os.NewFile(uintptr(one), "connection")
		conn, err := net.FileConn(file)
		file.Close() //nolint:errcheck // conn has its own descriptor
		if err == nil {
			conns = append(conns, conn)
		}
	}
}

// Close ends listening and closes what nobody has accepted.
func (l *drainingListener) Close() error {
	var err error
	l.once.Do(func() {
		err = l.Listener.Close()
		close(l.closed)
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, conn := range l.waiting {
			conn.Close() //nolint:errcheck // nobody serves it
		}
		l.waiting = nil
		if l.stopped {
			err = nil
		}
	})
	return err
}
