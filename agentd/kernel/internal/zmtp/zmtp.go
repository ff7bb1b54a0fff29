package zmtp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"
)

// A Kind is the type of our socket.
type Kind string

// The kinds that are spoken.
const (
	Dealer Kind = "DEALER" // to a ROUTER
	Sub    Kind = "SUB"    // to a PUB; it subscribes to everything
	Req    Kind = "REQ"    // to a REP; the empty frame in front is put and taken here
)

const (
	// MaxFrames bounds the frames of a message.
	MaxFrames = 8192
	// maxCommand bounds a command in bytes.
	maxCommand = 4 << 10
	// LargeFrame is from which size on a frame is offered to Conn.Large, in bytes.
	LargeFrame = 1 << 20
	// step is by how much memory is ahead of what has arrived of a frame, in bytes.
	step = 1 << 20

	flagMore    = 1
	flagLong    = 2
	flagCommand = 4
)

var (
	// ErrProtocol is returned when the peer does not speak ZMTP 3 or breaks it; the
	// connection is of no use any more.
	ErrProtocol = errors.New("the peer breaks ZeroMQ's protocol")
	// ErrTooLarge is returned by Recv for a message over the limit, which was passed
	// over: the next Recv returns the next message. See TooLargeError.
	ErrTooLarge = errors.New("message over the limit")
)

// TooLargeError says how large a message was that was passed over.
type TooLargeError struct {
	Bytes int64
}

// Error implements error.
func (e *TooLargeError) Error() string {
	return fmt.Sprintf("a message of %d bytes: %v", e.Bytes, ErrTooLarge)
}

// Is makes it ErrTooLarge.
func (e *TooLargeError) Is(target error) bool { return target == ErrTooLarge }

// ErrTaken is returned by Recv for a message that Large has taken.
var ErrTaken = errors.New("message taken as it came")

// Conn is a connection after its handshake.
type Conn struct {
	// Large, if not nil, is offered each frame of more than LargeFrame bytes, before it
	// is kept: the frames of the message before it, its size and its bytes as they come,
	// all of which it reads. false: it wants nothing of it and has read nothing. Of a
	// message that was taken the other frames are passed over. An error ends Recv. It is
	// set before the first Recv.
	Large func(before [][]byte, size int64, body io.Reader) (taken bool, err error)

	conn net.Conn
	kind Kind
	max  int
	in   *bufio.Reader

	mu  sync.Mutex // one message at a time
	hdr []byte
}

// New does the handshake on conn, which it owns from then on, whatever comes of it.
// ctx bounds the handshake alone. identity is the routing id that a ROUTER knows us
// by; empty lets it choose one. max bounds a received message in bytes.
func New(ctx context.Context, conn net.Conn, kind Kind, identity string, maxMessage int) (*Conn, error) {
	c := &Conn{conn: conn, kind: kind, max: maxMessage, in: bufio.NewReaderSize(conn, 64<<10)}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	err := c.handshake(identity)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = conn.Close()
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return nil, fmt.Errorf("zeromq handshake: %w", err)
	}
	return c, nil
}

func (c *Conn) handshake(identity string) error {
	if len(identity) > 255 {
		return errors.New("an identity over 255 bytes")
	}
	var greeting [64]byte
	greeting[0], greeting[9], greeting[10] = 0xff, 0x7f, 3
	copy(greeting[12:], "NULL")
	if _, err := c.conn.Write(greeting[:]); err != nil {
		return err
	}
	var theirs [64]byte
	if _, err := io.ReadFull(c.in, theirs[:]); err != nil {
		return err
	}
	switch {
	case theirs[0] != 0xff || theirs[9]&1 != 1 || theirs[10] < 3:
		return fmt.Errorf("%w: its greeting is not that of ZMTP 3", ErrProtocol)
	case string(bytes.TrimRight(theirs[12:32], "\x00")) != "NULL":
		return fmt.Errorf("%w: it wants a security mechanism", ErrProtocol)
	}
	ready := append([]byte{5}, "READY"...)
	ready = property(ready, "Socket-Type", string(c.kind))
	if c.kind != Sub {
		ready = property(ready, "Identity", identity)
	}
	// A short command holds 255 bytes at most.
	command := []byte{flagCommand, byte(len(ready))}
	if len(ready) > 255 {
		command = binary.BigEndian.AppendUint64([]byte{flagCommand | flagLong}, uint64(len(ready)))
	}
	if _, err := c.conn.Write(append(command, ready...)); err != nil {
		return err
	}
	flags, size, err := c.header()
	if err != nil {
		return err
	}
	if flags&flagCommand == 0 || size > maxCommand {
		return fmt.Errorf("%w: it sent no READY", ErrProtocol)
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(c.in, body); err != nil {
		return err
	}
	if !bytes.HasPrefix(body, []byte("\x05READY")) {
		return fmt.Errorf("%w: it refused the connection", ErrProtocol)
	}
	if peer := propertyOf(body[6:], "Socket-Type"); !fits(c.kind, peer) {
		return fmt.Errorf("%w: it is a socket of type %.20q, and ours is %s", ErrProtocol, peer, c.kind)
	}
	if c.kind == Sub {
		// Every topic. ZMTP 3.0 has it as a message; a peer of 3.1 takes that too.
		_, err = c.conn.Write([]byte{0, 1, 1})
	}
	return err
}

func fits(ours Kind, theirs string) bool {
	switch ours {
	case Dealer:
		return theirs == "ROUTER"
	case Sub:
		return theirs == "PUB" || theirs == "XPUB"
	default:
		return theirs == "REP" || theirs == "ROUTER"
	}
}

func property(b []byte, name, value string) []byte {
	b = append(append(b, byte(len(name))), name...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(value)))
	return append(b, value...)
}

func propertyOf(b []byte, name string) string {
	for len(b) > 0 {
		n := int(b[0])
		if len(b) < 1+n+4 {
			return ""
		}
		key := string(b[1 : 1+n])
		size := binary.BigEndian.Uint32(b[1+n:])
		b = b[1+n+4:]
		if uint64(size) > uint64(len(b)) {
			return ""
		}
		if strings.EqualFold(key, name) {
			return string(b[:size])
		}
		b = b[size:]
	}
	return ""
}

// header reads a frame's flags and size.
func (c *Conn) header() (flags byte, size uint64, err error) {
	if flags, err = c.in.ReadByte(); err != nil {
		return 0, 0, err
	}
	if flags&^(flagMore|flagLong|flagCommand) != 0 || flags&flagCommand != 0 && flags&flagMore != 0 {
		return 0, 0, fmt.Errorf("%w: a frame's flags are %#x", ErrProtocol, flags)
	}
	if flags&flagLong == 0 {
		b, err := c.in.ReadByte()
		return flags, uint64(b), unexpected(err)
	}
	var b [8]byte
	if _, err := io.ReadFull(c.in, b[:]); err != nil {
		return 0, 0, unexpected(err)
	}
	if size = binary.BigEndian.Uint64(b[:]); size > 1<<62 {
		return 0, 0, fmt.Errorf("%w: a frame of %d bytes", ErrProtocol, size)
	}
	return flags, size, nil
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Recv returns the frames of the next message. io.EOF means that the peer closed
// the connection between two messages; ErrTooLarge that a message was passed over.
func (c *Conn) Recv() ([][]byte, error) {
	var frames [][]byte
	var total int64
	over, taken := false, false
	for first := true; ; {
		flags, size, err := c.header()
		if err != nil {
			if !first {
				err = unexpected(err)
			}
			return nil, err
		}
		if flags&flagCommand != 0 {
			// PING and SUBSCRIBE are not for a peer of 3.0; whatever it is, it is no message.
			if size > maxCommand {
				return nil, fmt.Errorf("%w: a command of %d bytes", ErrProtocol, size)
			}
			if _, err := c.in.Discard(int(size)); err != nil {
				return nil, unexpected(err)
			}
			continue
		}
		total += int64(size)
		if !taken && !over && size > LargeFrame && c.Large != nil {
			body := io.LimitReader(c.in, int64(size))
			if taken, err = c.Large(frames, int64(size), body); err != nil {
				return nil, err
			}
			if taken {
				if _, err := io.Copy(io.Discard, body); err != nil {
					return nil, unexpected(err)
				}
				if frames, size = nil, 0; flags&flagMore == 0 {
					return nil, ErrTaken
				}
				first = false
				continue
			}
		}
		over = over || taken || total > int64(c.max) || len(frames) >= MaxFrames
		if over {
			frames = nil
			if _, err := io.CopyN(io.Discard, c.in, int64(size)); err != nil {
				return nil, unexpected(err)
			}
		} else {
			frame, err := c.frame(int(size))
			if err != nil {
				return nil, unexpected(err)
			}
			frames = append(frames, frame)
		}
		first = false
		if flags&flagMore != 0 {
			continue
		}
		if taken {
			return nil, ErrTaken
		}
		if over {
			return nil, &TooLargeError{Bytes: total}
		}
		if c.kind == Req && len(frames) > 0 && len(frames[0]) == 0 {
			frames = frames[1:]
		}
		return frames, nil
	}
}

// frame reads a frame's body; memory follows what arrives.
func (c *Conn) frame(size int) ([]byte, error) {
	if size <= step {
		b := make([]byte, size)
		_, err := io.ReadFull(c.in, b)
		return b, err
	}
	b := make([]byte, 0, step)
	for len(b) < size {
		if len(b) == cap(b) {
			bigger := make([]byte, len(b), min(2*cap(b), size))
			copy(bigger, b)
			b = bigger
		}
		n, err := io.ReadFull(c.in, b[len(b):cap(b)])
		b = b[:len(b)+n]
		if err != nil {
			return nil, err
		}
	}
	return b, nil
}

// Send sends a message. It blocks while the peer takes nothing; a deadline or Close
// ends that, and the connection is of no use after an error.
func (c *Conn) Send(frames [][]byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.kind == Req {
		frames = append([][]byte{nil}, frames...)
	}
	// Small messages go in one piece; large frames are not copied.
	var out net.Buffers
	b := c.hdr[:0]
	for i, f := range frames {
		var flags byte
		if i < len(frames)-1 {
			flags = flagMore
		}
		if len(f) < 256 {
			b = append(b, flags, byte(len(f)))
		} else {
			b = binary.BigEndian.AppendUint64(append(b, flags|flagLong), uint64(len(f)))
		}
		if len(f) <= 16<<10 {
			b = append(b, f...)
			continue
		}
		out = append(out, b, f)
		b = nil
	}
	if len(out) == 0 {
		c.hdr = b[:0]
		if cap(b) > 64<<10 {
			c.hdr = nil
		}
		_, err := c.conn.Write(b)
		return err
	}
	c.hdr = nil
	if len(b) > 0 {
		out = append(out, b)
	}
	_, err := out.WriteTo(c.conn)
	return err
}

// SetDeadline bounds Recv and Send from then on; zero takes the bound away.
func (c *Conn) SetDeadline(t time.Time) error { return c.conn.SetDeadline(t) }

// Raw is the connection itself, to be looked at: nobody else reads or writes it.
func (c *Conn) Raw() net.Conn { return c.conn }

// Close closes the connection at once; what Send has taken may be lost.
func (c *Conn) Close() error { return c.conn.Close() }
