package jupyter

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxPending and maxPendingBytes bound what waits for the host of a client's
	// messages; one message may go beyond the bytes.
	maxPending, maxPendingBytes = 256, 16 << 20
	// writeTime bounds how long a client may take for one message.
	writeTime = 5 * time.Minute
	// pingEvery is how often a silent client is pinged, and pongTime how long its answer may
	// take: a program in one thread answers when it reads again.
	pingEvery, pongTime = 25 * time.Second, 5 * time.Minute
	// Each message is followed by a ping while less than pingsAtOnce are under way,
	// else every pingAfter-th one, and the last one of several.
	pingsAtOnce, pingAfter = 8, 64
	// A ping that follows messages has pingMark and the number of the last one.
	pingMark, pingSize = 'm', 9
	// silentTime is after how long without a pong a nameless client that connects anew
	// is taken for the one that is silent.
	silentTime = 5 * time.Second
	// maxSession bounds a client's session id, in bytes.
	maxSession = 120
)

// errReplaced is why a WebSocket ends when its client has a newer one.
var errReplaced = proto.Errorf(proto.CodeCancelled, "a newer connection with this session_id took this one's place")

// pinged is a ping under way: it stands behind so many messages since the one before
// it, the last of which was sequence.
type pinged struct {
	sequence uint64
	messages int
	at       time.Time
}

// hijacker keeps the connection that is taken over.
type hijacker struct {
	http.ResponseWriter
	conn net.Conn
}

// Hijack implements http.Hijacker.
func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := http.NewResponseController(h.ResponseWriter).Hijack()
	h.conn = conn
	return conn, buffered, err
}

// conn is a client's WebSocket and its stream to the host.
type conn struct {
	server *Server
	caller Caller
	log    *slog.Logger
	kernel string
	client string
	// from tells a client without a name of its own from others; nil: it has one.
	from *origin
	// broke says that the client went without a word; set before done is closed.
	broke atomic.Bool
	v1    bool
	ws    *websocket.Conn
	// ctx is the connection's; its cause says why it ends. io is that of reads and
	// writes, which must not break off before the end has been said.
	ctx    context.Context
	cancel context.CancelCauseFunc
	io     context.Context
	done   chan struct{} // closed when all of it has ended
	work   sync.WaitGroup
	raw    net.Conn // what is below ws

	written atomic.Uint64 // the newest delivery that the client was sent

	// Only the goroutine of the stream uses these.
	unpinged  int    // messages since the last ping
	lastIOPub []byte // the parent header of the newest output

	mu        sync.Mutex
	changed   chan struct{} // closed and replaced when what follows changes
	pending   []*posternv1.KernelMessage
	bytes     int    // of pending
	sent      int    // how many of pending are on the present stream
	confirmed uint64 // what the client has read
	pings     []pinged
	heard     time.Time
}

// serveChannels serves a kernel's channels on a WebSocket.
func (s *Server) serveChannels(q *request) error {
	id, err := s.here(q)
	if err != nil {
		return err
	}
	if !sameSite(q.r) {
		return proto.Errorf(proto.CodeRoleDenied, "a WebSocket from another site is refused: its Origin is not this server's name (behind a proxy, have it pass on the Host)")
	}
	client := q.r.URL.Query().Get("session_id")
	if len(client) > maxSession {
		return proto.Errorf(proto.CodeInvalid, "a session_id has at most %d bytes", maxSession)
	}
	resume := client != ""
	var from *origin
	if client == "" {
		from = &origin{q.c.TokenId, id, q.c.Remote, q.r.UserAgent()}
		client, resume = s.nameless(*from)
	}
	c := &conn{
		server: s, caller: q.c, kernel: id, client: client, from: from, log: s.cfg.Logger.With("kernel", id),
		done: make(chan struct{}), changed: make(chan struct{}), heard: time.Now(),
	}
	c.ctx, c.cancel = context.WithCancelCause(s.ctx)
	defer c.cancel(nil)
	var stopIO context.CancelFunc
	c.io, stopIO = context.WithCancel(context.Background())
	defer stopIO()
	if err := s.add(c); err != nil {
		return err
	}
	defer s.remove(c)
	// Before the WebSocket, so that a refusal has a status.
	stream, err := s.cfg.Kernels.Attach(q.r.Context(), q.c, Attach{Kernel: id, Client: client, Resume: resume, After: c.written.Load()})
	if err != nil {
		return err
	}
	below := &hijacker{ResponseWriter: q.w}
	c.ws, err = websocket.Accept(below, q.r, &websocket.AcceptOptions{
		Subprotocols: []string{jupyter.SubprotocolV1}, InsecureSkipVerify: true, // see sameSite
		OnPongReceived: func(_ context.Context, payload []byte) { c.ponged(payload) },
	})
	if err != nil { // it has answered
		stream.Close() //nolint:errcheck // nothing was done with it
		return nil
	}
	c.raw, c.v1 = below.conn, c.ws.Subprotocol() == jupyter.SubprotocolV1
	c.ws.SetReadLimit(jupyter.MaxMessage + 1)
	c.serve(stream)
	return nil
}

// serve runs the connection to its end.
func (c *conn) serve(stream Channels) {
	if !c.caller.Expires.IsZero() {
		timer := time.AfterFunc(time.Until(c.caller.Expires), func() {
			c.cancel(proto.Errorf(proto.CodeUnauthenticated, "the API token has expired"))
		})
		defer timer.Stop()
	}
	c.work.Go(func() { c.cancel(c.read(stream)) })
	c.work.Go(c.keepAlive)
	c.work.Go(func() { c.cancel(c.relay(stream)) })
	<-c.ctx.Done()
	c.close(context.Cause(c.ctx))
	c.ws.CloseNow() //nolint:errcheck // what still waits on it ends
	c.work.Wait()
}

// close ends the WebSocket with a status that clients understand.
func (c *conn) close(why error) {
	var closed websocket.CloseError
	var write *writeError
	if errors.As(why, &closed) || errors.As(why, &write) || errors.Is(why, errReplaced) || why == nil || c.broke.Load() {
		return // the client has closed it, or has given it up
	}
	status, reason := websocket.StatusInternalError, proto.Detail(why).Message
	switch proto.CodeOf(why) {
	case proto.CodeUnavailable:
		status = websocket.StatusServiceRestart
	case proto.CodeNotFound, proto.CodeCancelled:
		status = websocket.StatusNormalClosure
	case proto.CodeInvalid:
		status = websocket.StatusInvalidFramePayloadData
	case proto.CodeBodyTooLarge:
		status = websocket.StatusMessageTooBig
	case proto.CodePolicyDenied, proto.CodeRoleDenied, proto.CodeUnauthenticated, proto.CodeOrganizationDisabled:
		status = websocket.StatusPolicyViolation
	}
	if len(reason) > 120 { // a control frame has room for 123 bytes
		reason = string([]rune(reason)[:100]) + "..."
		if len(reason) > 123 {
			reason = ""
		}
	}
	c.ws.Close(status, reason) //nolint:errcheck // it is over either way
}

// changedLocked tells those who wait for c.changed.
func (c *conn) changedLocked() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// read takes the client's messages until the WebSocket ends.
func (c *conn) read(first Channels) error {
	for {
		kind, data, err := c.ws.Read(c.io)
		if err != nil {
			cause := context.Cause(c.ctx)
			var closed websocket.CloseError
			var write *writeError
			switch {
			case errors.As(err, &closed):
				c.left()
			case cause == nil || errors.As(cause, &write): // not by us
				c.broke.Store(true)
			}
			if cause != nil {
				return cause
			}
			return err
		}
		var m *posternv1.KernelMessage
		if c.v1 {
			m, err = jupyter.DecodeV1(data)
		} else {
			m, err = jupyter.DecodeLegacy(data, kind == websocket.MessageBinary)
		}
		var h jupyter.Header
		if err == nil {
			h, err = jupyter.Check(m)
		}
		switch {
		case errors.Is(err, jupyter.ErrTooLarge):
			return &proto.Error{Code: proto.CodeBodyTooLarge, Message: err.Error()}
		case err != nil:
			return &proto.Error{Code: proto.CodeInvalid, Message: err.Error()}
		}
		c.server.cfg.Metrics.message(false)
		// The entry says who and what, not which stream carries it: the first one does.
		if err := first.Record(c.ctx, h, m); err != nil {
			return err
		}
		if err := c.enqueue(m); err != nil {
			return err
		}
	}
}

// enqueue waits until there is room for a message to wait in.
func (c *conn) enqueue(m *posternv1.KernelMessage) error {
	size := jupyter.Size(m)
	for {
		c.mu.Lock()
		c.heard = time.Now()
		if len(c.pending) < maxPending && c.bytes < maxPendingBytes {
			c.pending, c.bytes = append(c.pending, m), c.bytes+size
			c.changedLocked()
			c.mu.Unlock()
			return nil
		}
		changed := c.changed
		c.mu.Unlock()
		select {
		case <-changed:
		case <-c.ctx.Done():
			return context.Cause(c.ctx)
		}
	}
}

// write sends the client a message; too large a one is told instead.
func (c *conn) write(m *posternv1.KernelMessage) error {
	kind, data, err := c.encode(m)
	if err != nil {
		c.log.Warn("message of a kernel can't be sent to its client", "err", err)
		if kind, data, err = c.encode(c.notice("a message of the kernel is not shown: " + err.Error())); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(c.io, writeTime)
	defer cancel()
	if err := c.ws.Write(ctx, kind, data); err != nil {
		if c.ctx.Err() != nil {
			return context.Cause(c.ctx)
		}
		return err
	}
	c.server.cfg.Metrics.message(true)
	return nil
}

func (c *conn) encode(m *posternv1.KernelMessage) (websocket.MessageType, []byte, error) {
	if c.v1 {
		data, err := jupyter.EncodeV1(m)
		return websocket.MessageBinary, data, err
	}
	data, binary, err := jupyter.EncodeLegacy(m)
	if binary {
		return websocket.MessageBinary, data, err
	}
	return websocket.MessageText, data, err
}

// notice is a line on stderr of the cell that printed last.
func (c *conn) notice(text string) *posternv1.KernelMessage {
	m, err := jupyter.New(jupyter.IOPub, "stream", "postern", map[string]string{"name": "stderr", "text": "[postern] " + text + "\n"})
	if err != nil {
		panic(err) // texts always encode
	}
	if c.lastIOPub != nil {
		m.ParentHeader = c.lastIOPub
	}
	return m
}

// ping asks the client for a sign that it has read what it was sent. It belongs to
// the goroutine of the stream: the frame is written between two messages, so that it
// stands right behind the last one.
func (c *conn) ping() error {
	frame := append(make([]byte, 0, 2+pingSize), 0x89, pingSize, pingMark) // FIN and ping; RFC 6455, 5.2
	sequence := c.written.Load()
	frame = binary.BigEndian.AppendUint64(frame, sequence)
	c.mu.Lock()
	c.pings = append(c.pings, pinged{sequence, c.unpinged, time.Now()})
	c.mu.Unlock()
	c.unpinged = 0
	_, err := c.raw.Write(frame)
	return err
}

// ponged takes the client's answer: it has read all that was before the ping. Answers
// come in the order of the pings; one may stand for those before it.
func (c *conn) ponged(payload []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.heard = time.Now()
	if len(payload) != pingSize || payload[0] != pingMark {
		return
	}
	sequence := binary.BigEndian.Uint64(payload[1:])
	for len(c.pings) > 0 && c.pings[0].sequence <= sequence {
		c.confirmed = max(c.confirmed, c.pings[0].sequence) // never what the client makes up
		c.pings = c.pings[1:]
	}
	c.changedLocked()
}

// silent reports whether a ping has been under way for longer than a client that is
// there takes for it.
func (c *conn) silent() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.pings) > 0 && time.Since(c.pings[0].at) > silentTime
}

// left is told that the client has closed the WebSocket in order. It has answered each ping
// that it has read, so it has read nothing beyond the first one without an answer;
// a single message before that one is what it went away upon.
func (c *conn) left() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.pings) > 0 && c.pings[0].messages == 1 {
		c.confirmed = max(c.confirmed, c.pings[0].sequence)
	}
}

// keepAlive pings a client that is silent, so that one that has gone is noticed and
// proxies keep the connection.
func (c *conn) keepAlive() {
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	for {
		select {
		case <-c.ctx.Done():
			return
		case <-tick.C:
		}
		c.mu.Lock()
		silent := time.Since(c.heard)
		c.mu.Unlock()
		if silent > pongTime {
			c.broke.Store(true)
			c.cancel(proto.Errorf(proto.CodeTimeout, "the client answers no ping"))
			return
		}
		ctx, cancel := context.WithTimeout(c.ctx, pingEvery)
		c.ws.Ping(ctx) //nolint:errcheck // see heard
		cancel()
	}
}

var _ http.Handler = (*Server)(nil)
