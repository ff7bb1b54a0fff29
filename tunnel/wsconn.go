package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/coder/websocket"
)

// maxWebSocketMessage bounds a message of the peer. Ours are one TLS record.
const maxWebSocketMessage = 1 << 20

// wsConn carries bytes in binary WebSocket messages. It is not
// websocket.NetConn: that one uses cancellable contexts (ten times the
// allocations), closes the connection at a deadline and lifts the read limit.
// Deadlines are those of the wire below.
type wsConn struct {
	ws   *websocket.Conn
	wire *wire
	r    io.Reader // the message being read
}

var _ net.Conn = (*wsConn)(nil)

func newWSConn(ws *websocket.Conn, w *wire) *wsConn {
	ws.SetReadLimit(maxWebSocketMessage)
	return &wsConn{ws: ws, wire: w}
}

// ignorePing keeps coder/websocket from answering pings: its pong waits for the
// writer and ends the connection after 5 s. Liveness is measured inside.
func ignorePing(context.Context, []byte) bool { return false }

func (c *wsConn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if c.r == nil {
			typ, r, err := c.ws.Reader(context.Background())
			if err != nil {
				return 0, wsError(err)
			}
			if typ != websocket.MessageBinary {
				return 0, fmt.Errorf("%w: text message", ErrProtocol)
			}
			c.r = r
		}
		n, err := c.r.Read(p)
		if err == io.EOF {
			c.r, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, wsError(err)
		}
	}
}

func (c *wsConn) Write(p []byte) (int, error) {
	if err := c.ws.Write(context.Background(), websocket.MessageBinary, p); err != nil {
		return 0, wsError(err)
	}
	return len(p), nil
}

// Close ends the connection at once, without the WebSocket's closing handshake,
// and unblocks Read and Write.
func (c *wsConn) Close() error {
	err := c.wire.Close()
	_ = c.ws.CloseNow()
	return err
}

func (c *wsConn) LocalAddr() net.Addr                { return c.wire.LocalAddr() }
func (c *wsConn) RemoteAddr() net.Addr               { return c.wire.RemoteAddr() }
func (c *wsConn) SetDeadline(t time.Time) error      { return c.wire.SetDeadline(t) }
func (c *wsConn) SetReadDeadline(t time.Time) error  { return c.wire.SetReadDeadline(t) }
func (c *wsConn) SetWriteDeadline(t time.Time) error { return c.wire.SetWriteDeadline(t) }

// wsError unwraps what crypto/tls must see bare: it asserts net.Error without
// errors.As, and only a bare timeout leaves its state usable.
func wsError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return os.ErrDeadlineExceeded
	case errors.Is(err, io.EOF), websocket.CloseStatus(err) != -1:
		return io.EOF
	case errors.Is(err, io.ErrUnexpectedEOF):
		return io.ErrUnexpectedEOF
	}
	return err
}
