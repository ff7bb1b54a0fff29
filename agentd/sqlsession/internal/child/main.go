package child

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgproxy"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/proto"
)

// SocketFD is the descriptor of the socket to agentd, ParserFD that of the one
// that leads to the parser of statements, and HoldFD that of a socket on which the
// process hears of another agentd when its own is gone, or of something else where it
// is not to outlive agentd.
const (
	SocketFD = 3
	ParserFD = 4
	HoldFD   = 5
)

// Exit codes: agentd logs them.
const (
	exitDone     = 0
	exitUsage    = 2
	exitDatabase = 3 // the database closed an idle connection, or was left unclean
	exitProtocol = 4
)

// memoryLimit keeps the heap small (bytes): the buffers of a statement take
// about 4 MiB. A larger value still works, at the price of more collections.
const memoryLimit = 40 << 20

// process is the state of the running process.
type process struct {
	parser   pgtree.Parser
	sink     *sink
	requests chan request // from the goroutine that reads agentd's frames
	// session is set before Connected is sent, and so before any Run arrives.
	session engine
	// proxy is set while the process serves a client of PostgreSQL's own protocol;
	// proxied is closed when it does no more.
	proxy   atomic.Pointer[pgproxy.Proxy]
	proxied chan struct{}
	conn    net.Conn
	hold    hold
}

// request is a frame of agentd's that main answers.
type request struct {
	kind       frame.Type
	connect    *frame.ConnectRequest
	run        *frame.RunRequest
	introspect *frame.IntrospectRequest
	wire       *frame.WireRequest
	st         *statement
}

// Main runs the process of a SQL session and returns its exit code. Call it
// before anything else: it expects descriptor 3 to be agentd's socket.
func Main() int {
	if err := harden(); err != nil {
		fmt.Fprintln(os.Stderr, "sql session: cannot give up privileges:", err)
		return exitUsage
	}
	debug.SetMemoryLimit(memoryLimit)
	runtime.GOMAXPROCS(min(2, runtime.GOMAXPROCS(0)))
	conn, err := inherited(SocketFD)
	if err != nil {
		fmt.Fprintln(os.Stderr, "sql session: started without agentd's socket: this command is agentd's own")
		return exitUsage
	}
	// Where agentd runs no parser there is something else: statements are
	// refused then.
	introducer, _ := inherited(ParserFD)
	beside = introducer
	// What is said to an agentd that is gone must not end the process.
	signal.Ignore(syscall.SIGPIPE)
	return serve(conn, pgtree.NewClient(introducer), holdSocket())
}

// beside is what the process was given beside agentd's socket: see ParserFD.
var beside net.Conn

// serve answers agentd until its socket closes.
func serve(conn net.Conn, parser pgtree.Parser, listener *net.UnixListener) int {
	ended := make(chan int, 1)
	p := &process{parser: parser, sink: newSink(conn), requests: make(chan request, 1), proxied: make(chan struct{}), conn: conn, hold: hold{listener: listener, ended: ended}}
	go p.read(conn, ended)
	code := make(chan int, 1)
	go func() { code <- p.loop() }()
	select {
	case c := <-code:
		p.sink.close()
		_ = conn.Close()
		return c
	case c := <-ended:
		// agentd is gone. The database has been told; nothing is left to do.
		return c
	}
}

// read takes agentd's frames. Cancel acts at once; the rest goes to main.
func (p *process) read(conn net.Conn, ended chan<- int) {
	d := frame.NewReader(conn)
	var last *statement
	for {
		t, err := d.Next()
		if err != nil {
			if !p.hangup() {
				p.abandon(last)
			}
			if p.hold.grace.Load() > 0 {
				p.requests <- request{kind: frame.Resumed} // once it is idle
				return
			}
			ended <- exitDone
			return
		}
		r := request{kind: t}
		switch t {
		case frame.Connect:
			r.connect = &frame.ConnectRequest{}
			err = d.JSON(r.connect)
		case frame.Run:
			r.run = &frame.RunRequest{}
			if err = d.JSON(r.run); err == nil {
				// Frames come in order: a Cancel behind this one is for it,
				// one before it was for the statement before.
				last = newStatement(p.cancelRequest)
				r.st = last
			}
		case frame.Introspect:
			r.introspect = &frame.IntrospectRequest{}
			if err = d.JSON(r.introspect); err == nil {
				last = newStatement(p.cancelRequest)
				r.st = last
			}
		case frame.Cancel:
			var reason []byte
			if reason, err = d.Chunk(); err == nil && len(reason) == 1 && last != nil {
				last.stop(frame.Reason(reason[0]))
			}
			if err == nil {
				continue
			}
		case frame.Hold, frame.Release:
			if err = p.holdFrame(t, d); err == nil {
				continue
			}
		case frame.Check:
		case frame.Wire:
			r.wire = &frame.WireRequest{}
			err = d.JSON(r.wire)
		case frame.Data, frame.WireAck, frame.WireStop, frame.WireDrain:
			if err = p.wireFrame(t, d); err == nil {
				continue
			}
		default:
			err = fmt.Errorf("%w: %q from agentd", frame.ErrMalformed, t)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "sql session:", err)
			p.abandon(last)
			ended <- exitProtocol
			return
		}
		p.requests <- r
	}
}

// abandon cancels the statement under way, as agentd is gone.
func (p *process) abandon(last *statement) {
	if last == nil {
		return
	}
	last.mu.Lock()
	over := last.over
	last.mu.Unlock()
	if over {
		return
	}
	last.stop(frame.Draining)
	ctx, done := context.WithTimeout(context.Background(), cancelTimeout)
	defer done()
	// Not the goroutine of stop: this one's end is waited for.
	_ = p.cancelRequest(ctx)
	// It may have come between two messages; stop's goroutine repeats it.
	select {
	case <-last.finished:
	case <-ctx.Done():
	}
}

func (p *process) cancelRequest(ctx context.Context) error {
	// A statement exists only once there is a session; see loop.
	return p.session.cancel(ctx)
}

// loop answers requests one by one.
func (p *process) loop() int {
	r := <-p.requests
	if r.kind != frame.Connect {
		return exitProtocol
	}
	ctx, done := context.WithTimeout(context.Background(), time.Duration(r.connect.TimeoutMillis)*time.Millisecond)
	session, failure := open(ctx, r.connect, p.sink, p.parser)
	done()
	if failure != nil {
		_ = p.sink.send(frame.Failed, frame.FailedReply{Error: frame.FromError(failure)})
		return exitDone
	}
	p.session = session
	defer session.close()
	if p.sink.send(frame.Connected, session.about()) != nil {
		return exitProtocol
	}
	var cold warmer
	if r.connect.Settings == nil { // not for a client of PostgreSQL's own protocol
		cold, _ = session.(warmer)
	}
	for {
		r, lost := p.await(cold)
		cold = nil
		if lost != nil && r.kind == 0 {
			fmt.Fprintln(os.Stderr, "sql session: the database closed the idle connection")
			return exitDatabase
		}
		if lost != nil {
			failure := proto.Errorf(proto.CodeSourceUnreachable, "the connection to %s was lost", session.name())
			_ = p.sink.send(frame.Failed, frame.FailedReply{Error: frame.FromError(failure), Lost: true})
			return exitDatabase
		}
		var ok bool
		switch r.kind {
		case frame.Run:
			ok = p.run(r)
		case frame.Check:
			ok = p.check()
		case frame.Introspect:
			ok = p.introspect(r)
		case frame.Wire:
			return p.serveProxy(r.wire, p.conn)
		case frame.Resumed:
			if !p.resume() {
				return exitDone
			}
			continue
		}
		if !ok {
			return exitDatabase
		}
		if err := session.reset(); err != nil {
			fmt.Fprintln(os.Stderr, "sql session: cannot reset the database session:", clean(err.Error()))
			return exitDatabase
		}
		if p.sink.send(frame.Idle, nil) != nil {
			return exitProtocol
		}
	}
}

// run answers one Run; ok tells whether the database session may be used
// again.
func (p *process) run(r request) (ok bool) {
	s := p.session
	reply, lost := s.run(r.run, r.st)
	p.hold.ran(reply.Transaction)
	if lost {
		r.st.finish()
		_ = p.sink.send(frame.Failed, frame.FailedReply{Error: reply.Error, Lost: true})
		return false
	}
	if p.sink.send(frame.Done, reply) != nil {
		return false
	}
	return r.st.finish()
}

func (p *process) check() (ok bool) {
	checks, ok := p.session.check()
	return p.sink.send(frame.Checked, frame.CheckedReply{Checks: checks}) == nil && ok
}

// introspect answers one Introspect; ok tells whether the database session may be
// used again.
func (p *process) introspect(r request) (ok bool) {
	failure := p.session.introspect(r.introspect, r.st)
	clean := r.st.finish()
	sent := p.sink.send(frame.Introspected, frame.IntrospectedReply{Error: frame.FromError(failure)}) == nil
	return sent && clean && failure == nil
}

// await waits for a request and watches the idle connection meanwhile. An
// error means that the connection is dead; the request is zero if none came.
// If cold is not nil, it is warmed when no request comes at once.
func (p *process) await(cold warmer) (request, error) {
	var delay <-chan time.Time
	if cold != nil {
		timer := time.NewTimer(warmDelay)
		defer timer.Stop()
		delay = timer.C
	}
	for {
		stop := make(chan struct{})
		watched := make(chan error, 1)
		go func() { watched <- p.session.watch(stop) }()
		select {
		case r := <-p.requests:
			close(stop)
			return r, <-watched
		case err := <-watched:
			return request{}, err
		case <-delay:
			close(stop)
			err := <-watched
			if err == nil {
				err = cold.warm(func() bool { return len(p.requests) > 0 })
			}
			if err == nil {
				continue
			}
			select {
			case r := <-p.requests:
				return r, err
			default:
				return request{}, err
			}
		}
	}
}
