package pgproxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/wirestream"
)

const (
	// maxServerMessage bounds what is looked at of a message other than a row, in
	// bytes; of longer ones it is the head.
	maxServerMessage = 64 << 10
	headOfMessage    = 8 << 10
	// bulkAfter is from how many rows on a result counts as long; bulkLow is how many
	// bytes must wait in the socket then before we are woken up for them, and bulkPause
	// how long fewer may wait: the server sends 8 KiB at a time, and to wake up for each
	// costs more than the rows do.
	bulkAfter = 2_000
	bulkLow   = 96 << 10
	bulkPause = 2 * time.Millisecond
	// maxAnswers bounds the rows of a question of ours.
	maxAnswers = 10_000
)

var errServer = errors.New("the server does not keep to PostgreSQL's protocol")

// server is the connection to the database and what was read from it: b[e:r] is
// looked at and goes to the client, b[r:w] is not looked at yet. There are always
// HeaderSize bytes of no use before e.
type server struct {
	conn    net.Conn
	b       []byte
	e, r, w int
	raw     syscall.RawConn // nil where bulk reading can't be done
	low     bool            // the low-water mark is set
	bulk    bool            // the result under way is long
}

// pass hands on what was looked at. A statement of which the client gets a part
// before the log has its end is in the log by its beginning.
func (p *Proxy) pass() {
	if p.e == p.r {
		return
	}
	if st := p.current; st != nil && !st.told && st.tally.rows > st.before.rows {
		p.announce(st)
	}
	if p.r-p.e >= direct {
		p.out.addDirect(p.b, p.e, p.r)
	} else {
		p.out.add(p.b[p.e:p.r])
	}
	p.e = p.r
}

// need makes n bytes available from r on, at most maxServerMessage and a head.
func (p *Proxy) need(n int) error {
	for p.w-p.r < n {
		if err := p.fill(n); err != nil {
			return err
		}
	}
	return nil
}

// fill reads more, when r..w holds less than n bytes. What was looked at is handed on
// first: nothing waits for the server.
func (p *Proxy) fill(n int) error {
	p.pass()
	p.out.flush()
	if p.out.err != nil {
		return errEnded
	}
	if p.r == p.w {
		p.e, p.r, p.w = wirestream.HeaderSize, wirestream.HeaderSize, wirestream.HeaderSize
	}
	if p.bulk && len(p.b) < buffer || p.r+n > len(p.b) {
		b := p.b
		if size := max(n+wirestream.HeaderSize, len(p.b)); p.bulk || size > len(p.b) {
			b = make([]byte, max(size, buffer))
		}
		p.w = wirestream.HeaderSize + copy(b[wirestream.HeaderSize:], p.b[p.r:p.w])
		p.b, p.e, p.r = b, wirestream.HeaderSize, wirestream.HeaderSize
	}
	return p.read()
}

// read reads at least one byte, and tells of a statement that takes long.
func (p *Proxy) read() error {
	for {
		var n int
		var err error
		if p.bulk && p.raw != nil {
			n, err = p.readBulk(p.b[p.w:])
		} else {
			n, err = p.conn.Read(p.b[p.w:])
		}
		p.w += n
		switch {
		case n > 0:
			return nil
		case errors.Is(err, errQuiet):
		case errors.Is(err, os.ErrDeadlineExceeded):
			if err := p.quiet(); err != nil {
				return err
			}
		case err != nil:
			return err
		default:
			return io.ErrNoProgress
		}
		p.tellRunning()
	}
}

// quiet goes on after a read that ended to tell of a statement that takes long.
func (p *Proxy) quiet() error {
	p.mu.Lock()
	ended := p.ended
	if !ended {
		_ = p.conn.SetReadDeadline(time.Time{})
	}
	p.mu.Unlock()
	if ended {
		return fail{refuse(stateCanceled, "the database did not end a cancelled statement in time")}
	}
	p.tellRunning()
	return nil
}

// tellRunning tells of the statement under way if it takes long.
func (p *Proxy) tellRunning() {
	if st := p.current; st != nil && !st.told && time.Since(st.started) >= moment {
		p.announce(st)
		p.out.flush()
	}
}

var errQuiet = errors.New("nothing to read")

func (p *Proxy) readBulk(b []byte) (n int, failure error) {
	err := p.raw.Read(func(fd uintptr) bool {
		if !p.low {
			if failure = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, bulkLow); failure != nil {
				return true
			}
			p.low = true
		}
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(poll, int(bulkPause.Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
			failure = err
			return true
		}
		n, failure = unix.Read(int(fd), b)
		switch {
		case errors.Is(failure, unix.EAGAIN), errors.Is(failure, unix.EINTR):
			n, failure = 0, errQuiet
		case failure == nil && n == 0:
			failure = io.EOF
		}
		n = max(n, 0)
		return true
	})
	if failure == nil {
		failure = err
	}
	return n, failure
}

// endBulk makes the connection fit for the runtime's poller again.
func (p *Proxy) endBulk() {
	p.bulk = false
	if p.low {
		p.low = false
		_ = p.raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, 1) })
	}
	if len(p.b) > firstBuffer && p.e == p.r && p.w-p.r < firstBuffer-wirestream.HeaderSize {
		b := make([]byte, firstBuffer)
		p.w = wirestream.HeaderSize + copy(b[wirestream.HeaderSize:], p.b[p.r:p.w])
		p.b, p.e, p.r = b, wirestream.HeaderSize, wirestream.HeaderSize
	}
}

// header looks at the next message's head: its type and the length of its body.
func (p *Proxy) header() (byte, int, error) {
	if err := p.need(5); err != nil {
		return 0, 0, err
	}
	size := int64(binary.BigEndian.Uint32(p.b[p.r+1:])) - 4
	if size < 0 || size > 1<<30 {
		return 0, 0, fmt.Errorf("%w: a message of %d bytes", errServer, size)
	}
	return p.b[p.r], int(size), nil
}

// peek returns a message's body, or the head of a long one; nothing is consumed.
func (p *Proxy) peek(size int) ([]byte, error) {
	if size > maxServerMessage {
		size = headOfMessage
	}
	if err := p.need(5 + size); err != nil {
		return nil, err
	}
	return p.b[p.r+5 : p.r+5+size], nil
}

// through lets n bytes pass to the client.
func (p *Proxy) through(n int) error {
	for {
		k := min(n, p.w-p.r)
		p.r += k
		if n -= k; n == 0 {
			return nil
		}
		if err := p.fill(1); err != nil {
			return err
		}
	}
}

// skip leaves n bytes out.
func (p *Proxy) skip(n int) error {
	p.pass()
	for {
		k := min(n, p.w-p.r)
		p.r += k
		p.e = p.r
		if n -= k; n == 0 {
			return nil
		}
		if err := p.fill(1); err != nil {
			return err
		}
	}
}

// replace leaves n bytes out and says something else.
func (p *Proxy) replace(n int, message []byte) error {
	p.pass()
	p.out.add(message)
	return p.skip(n)
}

// aside takes what the server may say at any time.
func (p *Proxy) aside(t byte, size int) (bool, error) {
	quiet := len(p.config.Guard.Masks) > 0 || p.config.Guard.Mode == "metadata"
	switch t {
	case 'N':
		if quiet || p.swallow || p.stopped.Load() {
			return true, p.skip(5 + size)
		}
		return true, p.through(5 + size)
	case 'A':
		if quiet || !p.config.ReadWrite {
			return true, p.skip(5 + size)
		}
		return true, p.through(5 + size)
	case 'S':
		body, err := p.peek(size)
		if err != nil {
			return true, err
		}
		name, rest, _ := cut(body)
		value, _, _ := cut(rest)
		if err := p.parameter(name, value); err != nil {
			return true, err
		}
		return true, p.through(5 + size)
	case 'K':
		return true, p.skip(5 + size)
	}
	return false, nil
}

// parameter sees to it that what our verdicts rest on stays as it is.
func (p *Proxy) parameter(name, value string) error {
	wrong := false
	switch name {
	case "default_transaction_read_only":
		// Before PostgreSQL 14 nobody tells: see holdReadOnly.
		wrong = !p.config.ReadWrite && value != "on" && p.config.Version >= reportsReadOnly
	case "standard_conforming_strings":
		wrong = value != "on"
	case "client_encoding":
		wrong = value != "UTF8"
	case "session_authorization", "is_superuser":
		wrong = value != p.config.Parameters[name]
	case "search_path":
		p.epoch++
	}
	if wrong {
		return fail{refuse(stateDenied, "terminating connection: %s was changed to %q", name, clip(value, 64))}
	}
	return nil
}

// watch reads from an idle server until unwatch, or until something came.
func (p *Proxy) watch() <-chan error {
	if p.r == p.w {
		p.e, p.r, p.w = wirestream.HeaderSize, wirestream.HeaderSize, wirestream.HeaderSize
	}
	if p.w == len(p.b) {
		p.b = append(p.b, make([]byte, firstBuffer)...)
	}
	watched := make(chan error, 1)
	go func() {
		n, err := p.conn.Read(p.b[p.w:])
		p.w += n
		if n > 0 {
			err = nil
		}
		watched <- err
	}()
	return watched
}

// unwatch stops it, and takes what came.
func (p *Proxy) unwatch(watched <-chan error) error {
	_ = p.conn.SetReadDeadline(time.Now().Add(-time.Second))
	err := <-watched
	p.mu.Lock()
	if !p.ended {
		_ = p.conn.SetReadDeadline(time.Time{})
	}
	p.mu.Unlock()
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return p.asides()
}

// asides takes the messages of an idle server that are whole in the buffer.
func (p *Proxy) asides() error {
	for p.w-p.r >= 5 {
		t, size, err := p.header()
		if err != nil {
			return err
		}
		if size > maxServerMessage {
			return fmt.Errorf("%w: a message of %d bytes while idle", errServer, size)
		}
		if p.w-p.r < 5+size {
			if p.r+5+size > len(p.b) {
				b := make([]byte, maxServerMessage+64)
				p.w = wirestream.HeaderSize + copy(b[wirestream.HeaderSize:], p.b[p.r:p.w])
				p.b, p.e, p.r = b, wirestream.HeaderSize, wirestream.HeaderSize
			}
			return nil
		}
		if t == 'E' {
			p.lastWord(p.b[p.r+5 : p.r+5+size])
			_ = p.through(5 + size)
			p.pass()
			return errEnded
		}
		known, err := p.aside(t, size)
		if err != nil {
			return err
		}
		if !known {
			return fmt.Errorf("%w: message %q while idle", errServer, t)
		}
		p.pass()
	}
	return nil
}

// lastWord is what the server says when it ends the connection: the client hears it
// as it is.
func (p *Proxy) lastWord(body []byte) {
	d := serverError(body)
	p.fatal = &posternv1.WireEnd{Error: d, Sqlstate: d.GetSql().GetSqlstate(), Told: true}
}

// severity is an ErrorResponse's, not translated.
func severity(body []byte) string {
	for rest := body; len(rest) > 1; {
		name := rest[0]
		value, after, ok := cut(rest[1:])
		if !ok {
			return ""
		}
		if name == 'V' {
			return value
		}
		rest = after
	}
	return ""
}
