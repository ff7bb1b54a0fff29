package tunnel

import (
	"context"
	"crypto/rand"
	"encoding/binary"
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
//
// Without ws it is the bytes themselves, which a Carrier puts into a WebSocket.
type wsConn struct {
	ws   *websocket.Conn // nil with a Carrier
	wire *wire
	r    io.Reader // the message being read

	// For Write, which has one caller at a time: crypto/tls.
	client    bool // mask what is sent
	hdr       [maxFrameHeader]byte
	random    []byte // mask keys not used yet
	randomBuf [64]byte
}

var _ net.Conn = (*wsConn)(nil)

func newWSConn(ws *websocket.Conn, w *wire, client bool) *wsConn {
	ws.SetReadLimit(maxWebSocketMessage)
	return &wsConn{ws: ws, wire: w, client: client}
}

// ignorePing keeps coder/websocket from answering pings: its pong waits for the
// writer and ends the connection after 5 s. Liveness is measured inside.
func ignorePing(context.Context, []byte) bool { return false }

func (c *wsConn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if c.ws == nil {
		n, err := c.wire.Read(p)
		return n, wsError(err)
	}
	for {
		if err := c.await(); err != nil {
			return 0, err
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

// await waits for a message to read.
func (c *wsConn) await() error {
	if c.r != nil {
		return nil
	}
	typ, r, err := c.ws.Reader(context.Background())
	if err != nil {
		return wsError(err)
	}
	if typ != websocket.MessageBinary {
		return fmt.Errorf("%w: text message", ErrProtocol)
	}
	c.r = r
	return nil
}

// Write sends p as one message. The frame (RFC 6455 section 5.2) is put straight
// into the wire's buffer: coder/websocket would copy it through 4 KiB first, take
// two channel locks and ask for four random bytes each time. Its own frames, pongs
// and closes, go through wire.Write whole, so the two never mix.
func (c *wsConn) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if c.ws == nil {
		return c.wire.Write(p)
	}
	hdr := append(c.hdr[:0], 0x80|byte(opBinary))
	mask := byte(0)
	if c.client {
		mask = 0x80
	}
	switch {
	case len(p) < 126:
		hdr = append(hdr, mask|byte(len(p)))
	case len(p) <= 0xffff:
		hdr = binary.BigEndian.AppendUint16(append(hdr, mask|126), uint16(len(p)))
	default:
		hdr = binary.BigEndian.AppendUint64(append(hdr, mask|127), uint64(len(p)))
	}
	if !c.client {
		return c.wire.writeFrame(hdr, p, nil)
	}
	if len(c.random) < 4 {
		c.random = c.randomBuf[:]
		_, _ = rand.Read(c.random) // never fails
	}
	key := c.random[:4]
	c.random = c.random[4:]
	return c.wire.writeFrame(append(hdr, key...), p, key)
}

const opBinary = 2

// maxFrameHeader is the longest header of a frame, in bytes.
const maxFrameHeader = 14

// Close ends the connection at once, without the WebSocket's closing handshake,
// and unblocks Read and Write.
func (c *wsConn) Close() error {
	err := c.wire.Close()
	if c.ws != nil {
		_ = c.ws.CloseNow()
	}
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
