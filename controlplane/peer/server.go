package peer

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
)

// Config is what a Server needs. All fields but Metrics are required.
type Config struct {
	Logger *slog.Logger
	TLS    *tls.Config
	// Stream opens a stream on the tunnel of an agent that is here, of that
	// generation; AGENT_OFFLINE if there is none. It never forwards. ctx bounds the
	// opening.
	Stream func(ctx context.Context, agent string, generation int64, class string) (net.Conn, error)
	// Lanes serves the HTTP connections of lanes that peers pass on; a request's
	// RemoteAddr is the client's.
	Lanes http.Handler
	// Call answers a short question. Its errors carry codes of package proto.
	Call    func(ctx context.Context, name string, body []byte) ([]byte, error)
	Metrics *Metrics
}

// Server serves peers.
type Server struct {
	cfg   Config
	http  *http.Server
	lanes *http.Server
	queue *laneQueue
	wg    sync.WaitGroup
}

// NewServer returns a server; Serve starts it, Close must be called.
func NewServer(cfg Config) *Server {
	s := &Server{cfg: cfg, queue: newLaneQueue()}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /peer/v1/stream", s.stream)
	mux.HandleFunc("POST /peer/v1/lane", s.lane)
	mux.HandleFunc("POST /peer/v1/call/{name}", s.call)
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	errorLog := slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelDebug)
	s.http = &http.Server{
		Handler: mux, TLSConfig: cfg.TLS.Clone(), Protocols: protocols, ReadHeaderTimeout: openTime, IdleTimeout: 2 * idleTime, MaxHeaderBytes: 16 << 10, ErrorLog: errorLog,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: maxStreams, MaxReceiveBufferPerStream: streamWindow, MaxReceiveBufferPerConnection: connWindow,
			SendPingTimeout: quietTime, PingTimeout: pingTime,
		},
	}
	s.lanes = &http.Server{Handler: cfg.Lanes, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 10 * time.Second, MaxHeaderBytes: 64 << 10, ErrorLog: errorLog}
	s.wg.Go(func() { _ = s.lanes.Serve(s.queue) })
	return s
}

// Serve serves l until Shutdown or Close; then it returns http.ErrServerClosed.
func (s *Server) Serve(l net.Listener) error { return s.http.ServeTLS(l, "", "") }

// Shutdown takes no more streams and waits until those there are have ended, or ctx has.
func (s *Server) Shutdown(ctx context.Context) error { return s.http.Shutdown(ctx) }

// Close ends everything at once.
func (s *Server) Close() {
	_ = s.http.Close()
	_ = s.lanes.Close()
	_ = s.queue.Close()
	s.wg.Wait()
}

// stream serves a stream on an agent's tunnel.
func (s *Server) stream(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	generation, err := strconv.ParseInt(q.Get("generation"), 10, 64)
	if err != nil {
		proto.WriteHTTPError(w, proto.Errorf(proto.CodeInvalid, "a generation is a number"))
		return
	}
	opening, cancel := context.WithTimeout(r.Context(), openTime)
	conn, err := s.cfg.Stream(opening, q.Get("agent"), generation, q.Get("class"))
	cancel()
	s.cfg.Metrics.served(streams, err)
	if err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	s.splice(w, r, conn)
}

// lane serves a lane that came to the peer.
func (s *Server) lane(w http.ResponseWriter, r *http.Request) {
	near, far := net.Pipe()
	remote := r.Header.Get(remoteHeader)
	if net.ParseIP(remote) == nil {
		remote = "0.0.0.0"
	}
	err := s.queue.push(laneConn{Conn: far, remote: address(net.JoinHostPort(remote, "0"))})
	s.cfg.Metrics.served(lanes, err)
	if err != nil {
		_ = near.Close()
		proto.WriteHTTPError(w, err)
		return
	}
	s.splice(w, r, near)
}

func (s *Server) call(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxCall))
	if err != nil {
		proto.WriteHTTPError(w, proto.Errorf(proto.CodeInvalid, "the call could not be read: %w", err))
		return
	}
	answer, err := s.cfg.Call(r.Context(), r.PathValue("name"), body)
	s.cfg.Metrics.served(calls, err)
	if err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	_, _ = w.Write(answer)
}

// buffers are for copying; 64 KiB is what a frame of a bulk lane has at most.
var buffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// splice copies between an HTTP/2 stream and a connection until either side ends
// it, and closes the connection. An error of the connection reaches the peer as a
// stream that is cut, never as its end.
func (s *Server) splice(w http.ResponseWriter, r *http.Request, conn net.Conn) {
	control := http.NewResponseController(w)
	w.WriteHeader(http.StatusOK)
	if control.Flush() != nil {
		_ = conn.Close()
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := buffers.Get().(*[]byte)
		defer buffers.Put(b)
		_, _ = io.CopyBuffer(onlyWriter{conn}, onlyReader{r.Body}, *b)
		// The peer closed it, or is gone.
		_ = conn.Close()
	}()
	b := buffers.Get().(*[]byte)
	var err error
	for err == nil {
		var n int
		n, err = conn.Read(*b)
		if n > 0 {
			if _, werr := w.Write((*b)[:n]); werr != nil {
				err = werr
			} else if werr := control.Flush(); werr != nil {
				err = werr
			}
		}
	}
	buffers.Put(b)
	_ = conn.Close()
	select {
	case <-done: // the peer was first: whatever we read of it then is no error
		return
	default:
	}
	// Ends the reading of r.Body, too.
	_ = r.Body.Close()
	<-done
	if !errors.Is(err, io.EOF) {
		panic(http.ErrAbortHandler)
	}
}

// onlyReader and onlyWriter hide ReadFrom and WriteTo, which would bring buffers of
// their own.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)

// laneConn is a lane's connection with its client's address.
type laneConn struct {
	net.Conn
	remote net.Addr
}

func (c laneConn) RemoteAddr() net.Addr { return c.remote }

// laneQueue is the listener of the lanes that peers pass on.
type laneQueue struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newLaneQueue() *laneQueue {
	return &laneQueue{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (q *laneQueue) push(c net.Conn) error {
	select {
	case q.conns <- c:
		return nil
	case <-q.closed:
		return proto.Errorf(proto.CodeUnavailable, "this control plane is stopping: try again")
	}
}

func (q *laneQueue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.closed:
		return nil, net.ErrClosed
	}
}

func (q *laneQueue) Close() error   { q.once.Do(func() { close(q.closed) }); return nil }
func (q *laneQueue) Addr() net.Addr { return address("lanes") }
