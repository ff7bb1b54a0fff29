package child

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"

	"github.com/jackc/pgx/v5/pgproto3"
)

const (
	// inBuffer is the size of the read buffer in bytes. A row that fits is
	// read in one piece; a larger one goes field by field.
	inBuffer = 256 << 10
	// maxMessage bounds a message other than a row, in bytes. The longest that
	// makes sense describes 65,535 parameters; of longer ones (a notice with a
	// huge text) the head is looked at.
	maxMessage = 512 << 10
	// headOfMessage is how much of an overlong message is kept, in bytes.
	headOfMessage = 16 << 10
	// maxNotices is how many notices of a statement are kept; the rest are
	// counted out silently, as the outcome must stay small.
	maxNotices = 50
)

// errProtocol is returned when the server breaks the protocol.
var errProtocol = errors.New("the server does not keep to PostgreSQL's protocol")

// wire speaks PostgreSQL's protocol 3.0 on an authenticated connection. It
// belongs to one goroutine at a time.
type wire struct {
	conn net.Conn
	in   []byte
	r, w int
	out  []byte
	// bulk reads long results (nil where that can't be done); low is set
	// while its low-water mark is.
	bulk syscall.RawConn
	low  bool
	// tx is the transaction status of the last ReadyForQuery: I, T or E.
	tx      byte
	params  map[string]string
	notices []pgproto3.NoticeResponse
}

func newWire(conn net.Conn, params map[string]string) *wire {
	return &wire{conn: conn, in: make([]byte, inBuffer), tx: 'I', params: params, bulk: bulkConn(conn)}
}

// send appends messages to what flush writes.
func (c *wire) send(messages ...pgproto3.FrontendMessage) error {
	for _, m := range messages {
		var err error
		if c.out, err = m.Encode(c.out); err != nil {
			return fmt.Errorf("encode %T: %w", m, err)
		}
	}
	return nil
}

func (c *wire) flush() error {
	_, err := c.conn.Write(c.out)
	if cap(c.out) > inBuffer {
		c.out = nil // a statement of megabytes
	}
	c.out = c.out[:0]
	return err
}

// fill reads at least one byte more. There must be room: see need.
func (c *wire) fill() error {
	if c.r == c.w {
		c.r, c.w = 0, 0
	}
	if err := c.endBulk(); err != nil {
		return err
	}
	n, err := c.conn.Read(c.in[c.w:])
	c.w += n
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// room makes the buffer able to hold n bytes from r on.
func (c *wire) room(n int) {
	if c.r+n <= len(c.in) {
		return
	}
	if n > len(c.in) {
		bigger := make([]byte, n)
		c.w = copy(bigger, c.in[c.r:c.w])
		c.in, c.r = bigger, 0
		return
	}
	c.w = copy(c.in, c.in[c.r:c.w])
	c.r = 0
}

// need makes n bytes available from r on.
func (c *wire) need(n int) error {
	if c.w-c.r >= n {
		return nil
	}
	c.room(n)
	for c.w-c.r < n {
		if err := c.fill(); err != nil {
			return err
		}
	}
	return nil
}

// header returns the type of the next message and the size of its body, which
// follow at r+5; nothing is consumed.
func (c *wire) header() (byte, int, error) {
	if err := c.need(5); err != nil {
		return 0, 0, err
	}
	size := int64(binary.BigEndian.Uint32(c.in[c.r+1:])) - 4
	if size < 0 || size > 1<<30 {
		return 0, 0, fmt.Errorf("%w: a message of %d bytes", errProtocol, size)
	}
	return c.in[c.r], int(size), nil
}

// skip passes over n bytes without keeping them.
func (c *wire) skip(n int) error {
	for n > 0 {
		if c.r == c.w {
			if err := c.fill(); err != nil {
				return err
			}
		}
		k := min(n, c.w-c.r)
		c.r += k
		n -= k
	}
	return nil
}

// message returns the next message that is not an aside (notice, parameter
// status, notification); body is valid until the next call. Rows may come
// through here too, where they are not wanted.
func (c *wire) message() (t byte, body []byte, err error) {
	for {
		if t, body, err = c.one(); err != nil || t != 0 {
			return t, body, err
		}
	}
}

// one takes one message; its type is 0 for an aside, which is taken care of.
// What comes behind an aside may be a row, which has a way of its own.
func (c *wire) one() (t byte, body []byte, err error) {
	t, size, err := c.header()
	if err != nil {
		return 0, nil, err
	}
	keep := size
	if size > maxMessage {
		keep = headOfMessage
	}
	if err := c.need(5 + keep); err != nil {
		return 0, nil, err
	}
	body = c.in[c.r+5 : c.r+5+keep]
	c.r += 5 + keep
	if size > keep {
		body = append([]byte(nil), body...)
		if err := c.skip(size - keep); err != nil {
			return 0, nil, err
		}
	}
	if c.aside(t, body) {
		return 0, nil, nil
	}
	return t, body, nil
}

// aside takes what the server may send at any time; it tells whether it did.
func (c *wire) aside(t byte, body []byte) bool {
	switch t {
	case 'N':
		var notice pgproto3.NoticeResponse
		if len(c.notices) < maxNotices && notice.Decode(body) == nil {
			c.notices = append(c.notices, notice)
		}
	case 'S':
		var status pgproto3.ParameterStatus
		if status.Decode(body) == nil && len(c.params) < 100 {
			c.params[status.Name] = status.Value
		}
	case 'A':
	case 'Z':
		if len(body) == 1 {
			c.tx = body[0]
		}
		return false
	default:
		return false
	}
	return true
}

// decodeError reads an ErrorResponse.
func decodeError(body []byte) *pgproto3.ErrorResponse {
	var e pgproto3.ErrorResponse
	if err := e.Decode(body); err != nil && e.Code == "" {
		e.Severity, e.Code, e.Message = "ERROR", "XX000", "the server sent an error that can't be read"
	}
	return &e
}

// untilReady reads to the end of a cycle. visit, which may be nil, sees every
// message but the last. The first error of the server is returned apart.
func (c *wire) untilReady(visit func(t byte, body []byte) error) (*pgproto3.ErrorResponse, error) {
	var refusal *pgproto3.ErrorResponse
	for {
		t, body, err := c.message()
		if err != nil {
			if refusal != nil {
				return refusal, nil // a FATAL error, then the end
			}
			return nil, err
		}
		switch t {
		case 'Z':
			return refusal, nil
		case 'E':
			if refusal == nil {
				refusal = decodeError(body)
			}
		case 'G', 'W':
			// A COPY that waits for data would wait for ever.
			if err := c.send(&pgproto3.CopyFail{Message: "COPY is not supported"}, &pgproto3.Sync{}); err != nil {
				return nil, err
			}
			if err := c.flush(); err != nil {
				return nil, err
			}
		}
		if visit != nil {
			if err := visit(t, body); err != nil {
				return refusal, err
			}
		}
	}
}

// simple runs our own SQL by the simple protocol and returns the rows of text;
// NULL is "".
func (c *wire) simple(sql string) ([][]string, *pgproto3.ErrorResponse, error) {
	if err := c.send(&pgproto3.Query{String: sql}); err != nil {
		return nil, nil, err
	}
	if err := c.flush(); err != nil {
		return nil, nil, err
	}
	var rows [][]string
	refusal, err := c.untilReady(func(t byte, body []byte) error {
		if t != 'D' || len(rows) >= 10000 {
			return nil
		}
		var row pgproto3.DataRow
		if err := row.Decode(body); err != nil {
			return fmt.Errorf("%w: %v", errProtocol, err)
		}
		texts := make([]string, len(row.Values))
		for i, v := range row.Values {
			texts[i] = string(v)
		}
		rows = append(rows, texts)
		return nil
	})
	return rows, refusal, err
}
