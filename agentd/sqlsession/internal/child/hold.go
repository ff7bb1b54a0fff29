package child

import (
	"errors"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
)

// takeUpTimeout bounds the greeting of an agentd that has connected.
const takeUpTimeout = 5 * time.Second

// hold is what lets the process of a session that stays outlive agentd.
type hold struct {
	listener *net.UnixListener // nil: it can't
	ended    chan<- int
	// grace is how long to wait for another agentd, in nanoseconds; 0: not at all.
	grace atomic.Int64

	// The rest belongs to loop.
	transaction string
	statements  uint64
	last        time.Time // when the last statement ended
}

// holdSocket is the listener that agentd gave us, nil if there is none.
func holdSocket() *net.UnixListener {
	f := os.NewFile(HoldFD, "hold")
	if f == nil {
		return nil
	}
	defer func() { _ = f.Close() }()
	l, err := net.FileListener(f)
	if err != nil {
		return nil
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		_ = l.Close()
		return nil
	}
	u.SetUnlinkOnClose(false) // its name is agentd's
	return u
}

// holdFrame takes a Hold or a Release.
func (p *process) holdFrame(t frame.Type, d *frame.Reader) error {
	if t == frame.Release {
		p.hold.grace.Store(0)
		_, err := d.Bytes()
		return err
	}
	var r frame.HoldRequest
	if err := d.JSON(&r); err != nil {
		return err
	}
	if p.hold.listener == nil {
		return errors.New("told to outlive agentd without a socket for the next one")
	}
	p.hold.grace.Store(int64(time.Duration(r.GraceMillis) * time.Millisecond))
	return nil
}

// ran notes the end of a statement.
func (h *hold) ran(transaction string) {
	h.transaction, h.last = transaction, time.Now()
	h.statements++
}

// resume waits for another agentd, and for the end of the database's connection, which
// ends the process, too. It runs in loop, so no statement is under way.
func (p *process) resume() bool {
	p.sink.drain() // what the one that is gone did not get is lost
	_ = p.conn.Close()
	conn, introducer := p.awaitAgentd(time.Duration(p.hold.grace.Load()))
	if conn == nil {
		return false
	}
	p.conn, p.sink.conn, p.sink.broken = conn, conn, false
	if c, ok := p.parser.(*pgtree.Client); ok {
		c.Replace(introducer)
	} else if introducer != nil {
		_ = introducer.Close()
	}
	reply := frame.ResumedReply{Transaction: p.hold.transaction, Statements: p.hold.statements}
	if reply.Transaction == "" {
		reply.Transaction = "I"
	}
	if !p.hold.last.IsZero() {
		reply.IdleMillis = time.Since(p.hold.last).Milliseconds()
	}
	go p.read(conn, p.hold.ended)
	return p.sink.send(frame.Resumed, reply) == nil
}

// awaitAgentd returns the connection of the next agentd and the way to its parser;
// nil if none came in time or the database's connection ended.
func (p *process) awaitAgentd(grace time.Duration) (conn, introducer *net.UnixConn) {
	l := p.hold.listener
	if err := l.SetDeadline(time.Now().Add(grace)); err != nil {
		return nil, nil
	}
	stop, watched := make(chan struct{}), make(chan error, 1)
	go func() {
		err := p.session.watch(stop)
		if err != nil {
			_ = l.SetDeadline(time.Now().Add(-time.Second))
		}
		watched <- err
	}()
	for conn == nil {
		c, err := l.AcceptUnix()
		if err != nil {
			break
		}
		if introducer, err = greet(c); err != nil {
			_ = c.Close()
			continue
		}
		conn = c
	}
	close(stop)
	if err := <-watched; err != nil && conn != nil {
		_ = conn.Close()
		conn = nil
	}
	if conn == nil && introducer != nil {
		_ = introducer.Close()
		introducer = nil
	}
	return conn, introducer
}

// greet makes sure that it is agentd who has connected, and takes what it brings.
func greet(c *net.UnixConn) (introducer *net.UnixConn, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred
	var perr error
	if err := raw.Control(func(fd uintptr) { peer, perr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, err
	}
	if perr != nil {
		return nil, perr
	}
	if peer.Uid != 0 && int(peer.Uid) != os.Getuid() {
		return nil, errors.New("not agentd")
	}
	if err := c.SetDeadline(time.Now().Add(takeUpTimeout)); err != nil {
		return nil, err
	}
	f, greeting, err := pgtree.ReceiveFile(c)
	if err != nil {
		return nil, err
	}
	if f != nil {
		conn, cerr := net.FileConn(f)
		_ = f.Close()
		if cerr == nil {
			introducer, _ = conn.(*net.UnixConn)
		}
	}
	if greeting == frame.TakeUp {
		_, err = c.Write([]byte{frame.Taken})
	} else {
		err = syscall.EPROTO
	}
	if err = errors.Join(err, c.SetDeadline(time.Time{})); err != nil && introducer != nil {
		_ = introducer.Close()
		introducer = nil
	}
	return introducer, err
}
