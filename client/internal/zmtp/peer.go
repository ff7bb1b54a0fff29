package zmtp

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

const (
	// MaxMessage bounds a message, in bytes, and MaxFrames its frames.
	MaxMessage = 65 << 20
	MaxFrames  = 5000
	// queueBytes is how much waits for a peer at most, besides one message.
	queueBytes = 8 << 20
	// stallTime is how long a peer may take nothing while something waits for it.
	stallTime = 60 * time.Second
	// greetTime bounds the handshake.
	greetTime = 10 * time.Second
	// maxPeers bounds the peers of a socket.
	maxPeers = 256

	flagMore, flagLong, flagCommand = 1, 2, 4
	// overhead is what a frame costs beyond its bytes, roughly.
	overhead = 64
)

var errMalformed = errors.New("malformed ZMTP")

// peer is one connection.
type peer struct {
	conn     net.Conn
	in       *bufio.Reader
	identity string

	mu     sync.Mutex
	queue  [][]byte // encoded messages
	bytes  int
	change chan struct{} // closed and replaced when the above changes
	closed bool
}

func newPeer(conn net.Conn) *peer {
	return &peer{conn: conn, in: bufio.NewReaderSize(conn, 64<<10), change: make(chan struct{})}
}

// greet shakes hands as a socket of a kind.
func greet(conn net.Conn, kind string) (*peer, error) {
	conn.SetDeadline(time.Now().Add(greetTime)) //nolint:errcheck // then it has none
	hello := make([]byte, 64)
	hello[0], hello[8], hello[9], hello[10] = 0xff, 1, 0x7f, 3
	copy(hello[12:], "NULL")
	if _, err := conn.Write(hello); err != nil {
		return nil, err
	}
	p := newPeer(conn)
	theirs := make([]byte, 64)
	if _, err := io.ReadFull(p.in, theirs); err != nil {
		return nil, err
	}
	if theirs[0] != 0xff || theirs[9]&1 == 0 || theirs[10] < 3 {
		return nil, fmt.Errorf("%w: the peer speaks no ZMTP 3", errMalformed)
	}
	if mechanism := string(bytes.TrimRight(theirs[12:32], "\x00")); mechanism != "NULL" {
		return nil, fmt.Errorf("%w: the peer wants security %q", errMalformed, mechanism)
	}
	ready := append([]byte{5}, "READY"...)
	ready = append(append(ready, byte(len("Socket-Type"))), "Socket-Type"...)
	ready = append(binary.BigEndian.AppendUint32(ready, uint32(len(kind))), kind...)
	if _, err := conn.Write(appendFrame(nil, flagCommand, ready)); err != nil {
		return nil, err
	}
	flags, body, err := p.frame(4096)
	if err != nil {
		return nil, err
	}
	if flags&flagCommand == 0 {
		return nil, fmt.Errorf("%w: no READY", errMalformed)
	}
	name, properties, err := command(body)
	if err != nil || name != "READY" {
		return nil, fmt.Errorf("%w: %q instead of READY", errMalformed, name)
	}
	for len(properties) > 0 {
		n := int(properties[0])
		if len(properties) < 1+n+4 {
			return nil, errMalformed
		}
		key, rest := string(properties[1:1+n]), properties[1+n:]
		size := binary.BigEndian.Uint32(rest)
		if uint64(len(rest)) < 4+uint64(size) {
			return nil, errMalformed
		}
		if bytes.EqualFold([]byte(key), []byte("Identity")) {
			p.identity = string(rest[4 : 4+size])
		}
		properties = rest[4+size:]
	}
	return p, conn.SetDeadline(time.Time{})
}

func command(body []byte) (name string, rest []byte, err error) {
	if len(body) == 0 || len(body) < 1+int(body[0]) {
		return "", nil, errMalformed
	}
	n := int(body[0])
	return string(body[1 : 1+n]), body[1+n:], nil
}

func appendFrame(b []byte, flags byte, body []byte) []byte {
	if len(body) > 255 {
		b = binary.BigEndian.AppendUint64(append(b, flags|flagLong), uint64(len(body)))
	} else {
		b = append(b, flags, byte(len(body)))
	}
	return append(b, body...)
}

func encode(frames [][]byte) []byte {
	size := 0
	for _, f := range frames {
		size += 9 + len(f)
	}
	b := make([]byte, 0, size)
	for i, f := range frames {
		flags := byte(flagMore)
		if i == len(frames)-1 {
			flags = 0
		}
		b = appendFrame(b, flags, f)
	}
	return b
}

// frame reads a frame of at most limit bytes.
func (p *peer) frame(limit int) (flags byte, body []byte, err error) {
	if flags, err = p.in.ReadByte(); err != nil {
		return 0, nil, err
	}
	var size uint64
	if flags&flagLong != 0 {
		var b [8]byte
		if _, err = io.ReadFull(p.in, b[:]); err != nil {
			return 0, nil, err
		}
		size = binary.BigEndian.Uint64(b[:])
	} else {
		b, err := p.in.ReadByte()
		if err != nil {
			return 0, nil, err
		}
		size = uint64(b)
	}
	if size > uint64(limit) {
		return 0, nil, fmt.Errorf("%w: a frame of %d bytes", errMalformed, size)
	}
	if size <= 64<<10 {
		body = make([]byte, size)
		_, err = io.ReadFull(p.in, body)
		return flags, body, err
	}
	// Memory follows what arrives: a length alone makes nobody allocate.
	var grown bytes.Buffer
	n, err := io.CopyN(&grown, p.in, int64(size))
	if err == nil && uint64(n) != size {
		err = io.ErrUnexpectedEOF
	}
	return flags, grown.Bytes(), err
}

// message reads the next message; commands are dealt with by f, which may be nil.
func (p *peer) message(f func(name string, body []byte)) ([][]byte, error) {
	var frames [][]byte
	left := MaxMessage
	for {
		flags, body, err := p.frame(left)
		if err != nil {
			return nil, err
		}
		if flags&flagCommand != 0 {
			name, rest, err := command(body)
			if err != nil {
				return nil, err
			}
			if name == "PING" && len(rest) >= 2 {
				p.put(appendFrame(nil, flagCommand, append([]byte("\x04PONG"), rest[2:]...)))
			} else if f != nil {
				f(name, rest)
			}
			continue
		}
		left -= len(body) + overhead
		frames = append(frames, body)
		if len(frames) > MaxFrames || left < 0 {
			return nil, fmt.Errorf("%w: a message over the limit", errMalformed)
		}
		if flags&flagMore == 0 {
			return frames, nil
		}
	}
}

// put queues an encoded message and waits while the queue is full. It reports
// whether the peer is there.
func (p *peer) put(message []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.closed && p.bytes >= queueBytes {
		before, change := p.bytes, p.change
		p.mu.Unlock()
		timer := time.NewTimer(stallTime)
		select {
		case <-change:
			timer.Stop()
			p.mu.Lock()
		case <-timer.C:
			p.mu.Lock()
			if p.bytes >= before {
				p.closeLocked()
			}
		}
	}
	if p.closed {
		return false
	}
	p.queue, p.bytes = append(p.queue, message), p.bytes+len(message)
	p.changeLocked()
	return true
}

func (p *peer) changeLocked() {
	close(p.change)
	p.change = make(chan struct{})
}

func (p *peer) closeLocked() {
	if !p.closed {
		p.closed = true
		p.conn.Close() //nolint:errcheck // it ends reader and writer
		p.changeLocked()
	}
}

func (p *peer) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closeLocked()
}

// write writes what is queued until the peer ends.
func (p *peer) write() {
	defer p.close()
	for {
		p.mu.Lock()
		for len(p.queue) == 0 && !p.closed {
			change := p.change
			p.mu.Unlock()
			<-change
			p.mu.Lock()
		}
		if p.closed {
			p.mu.Unlock()
			return
		}
		queue := net.Buffers(p.queue)
		n := p.bytes
		p.queue = nil
		p.mu.Unlock()
		if _, err := queue.WriteTo(p.conn); err != nil {
			return
		}
		p.mu.Lock()
		p.bytes -= n
		p.changeLocked()
		p.mu.Unlock()
	}
}

// drained waits until everything is written, at most for a time.
func (p *peer) drained(limit time.Duration) {
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	for {
		p.mu.Lock()
		done, change := p.bytes == 0 || p.closed, p.change
		p.mu.Unlock()
		if done {
			return
		}
		select {
		case <-change:
		case <-deadline.C:
			return
		}
	}
}
