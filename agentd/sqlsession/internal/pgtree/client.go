package pgtree

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// The introducer's answers.
const (
	Introduced = 'k' // with a descriptor
	NoParser   = 'u' // there is none now
)

// maxWait bounds a Parse whose context does not end sooner: a parser takes a second
// of a processor to start, which a busy host may have to spare only late.
const maxWait = time.Minute

// ErrUnavailable is returned when there is no parser to ask: the statement is
// not looked at and must not run.
var ErrUnavailable = errors.New("the parser of statements is not available: try again")

// Client asks the parser processes. It holds a connection to each lane that it
// has used. It is safe for concurrent use: one text is parsed at a time.
type Client struct {
	introducer *net.UnixConn

	mu    sync.Mutex // held for a whole Parse
	owed  int        // answers of the introducer that nobody waited for
	conns map[Lane]net.Conn
}

// NewClient makes a Client that gets its connections over introducer, which it
// owns from now on. nil: Parse always fails with ErrUnavailable.
func NewClient(introducer *net.UnixConn) *Client {
	return &Client{introducer: introducer, conns: make(map[Lane]net.Conn)}
}

// Parse implements Parser. It waits for a parser that is being started, a
// minute at most.
func (c *Client) Parse(ctx context.Context, text string) (*Tree, error) {
	lane, err := Measure(text)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	ctx, done := context.WithTimeout(ctx, maxWait)
	defer done()
	for {
		conn, fresh, err := c.connection(ctx, lane)
		if err != nil {
			return nil, err
		}
		tree, err := ask(ctx, conn, text)
		var gone *connectionError
		if !errors.As(err, &gone) {
			return tree, err
		}
		_ = conn.Close()
		delete(c.conns, lane)
		switch {
		case ctx.Err() != nil:
			return nil, fmt.Errorf("%w (%w)", ErrUnavailable, context.Cause(ctx))
		case fresh:
			return nil, fmt.Errorf("%w (%w)", ErrUnavailable, gone.err)
		}
		// The parser was replaced since the last text: ask the new one.
	}
}

// Replace makes the Client ask the parsers that introducer leads to, which it owns from
// now on; nil: none.
func (c *Client) Replace(introducer *net.UnixConn) {
	c.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.introducer, c.owed = introducer, 0
}

// Close ends the connections; Parse fails afterwards.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.introducer != nil {
		_ = c.introducer.Close()
		c.introducer = nil
	}
	for _, conn := range c.conns {
		_ = conn.Close()
	}
	clear(c.conns)
}

// connection returns the lane's; fresh tells that it was never used.
func (c *Client) connection(ctx context.Context, lane Lane) (conn net.Conn, fresh bool, err error) {
	if conn := c.conns[lane]; conn != nil {
		return conn, false, nil
	}
	if c.introducer == nil {
		return nil, false, ErrUnavailable
	}
	stop := expire(ctx, c.introducer)
	defer stop()
	f, answer, err := func() (io.Closer, byte, error) {
		if _, err := c.introducer.Write([]byte{byte(lane)}); err != nil {
			return nil, 0, err
		}
		c.owed++
		for c.owed > 1 { // that to a question whose asker went away
			f, _, err := ReceiveFile(c.introducer)
			if err != nil {
				return nil, 0, err
			}
			c.owed--
			if f != nil {
				_ = f.Close()
			}
		}
		f, answer, err := ReceiveFile(c.introducer)
		if err == nil {
			c.owed--
		}
		if err != nil || f == nil {
			return nil, answer, err
		}
		defer func() { _ = f.Close() }()
		conn, err = net.FileConn(f)
		return f, answer, err
	}()
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, false, fmt.Errorf("%w (%w)", ErrUnavailable, err) // the answer is owed
	case err != nil:
		_ = c.introducer.Close()
		c.introducer = nil
		return nil, false, fmt.Errorf("%w (%w)", ErrUnavailable, err)
	case answer != Introduced || f == nil:
		return nil, false, ErrUnavailable
	}
	c.conns[lane] = conn
	return conn, true, nil
}

// expire makes waits on conn end with ctx. Call stop when they are over.
func expire(ctx context.Context, conn net.Conn) (stop func()) {
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline)
	cancel := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now().Add(-time.Second)) })
	return func() {
		cancel()
		_ = conn.SetDeadline(time.Time{})
	}
}

// connectionError is an end of the connection in the middle of a text.
type connectionError struct{ err error }

func (e *connectionError) Error() string { return e.err.Error() }

// ask sends one text and reads the answer.
func ask(ctx context.Context, conn net.Conn, text string) (*Tree, error) {
	stop := expire(ctx, conn)
	defer stop()
	b := make([]byte, 4, 4+len(text))
	binary.BigEndian.PutUint32(b, uint32(len(text)))
	if _, err := conn.Write(append(b, text...)); err != nil {
		return nil, &connectionError{err}
	}
	var header [5]byte
	if _, err := io.ReadFull(conn, header[:]); err != nil {
		return nil, &connectionError{err}
	}
	size := binary.BigEndian.Uint32(header[1:])
	if size > MaxTree {
		return nil, &connectionError{errors.New("the parser's answer is too long")}
	}
	payload := make([]byte, size)
	if _, err := io.ReadFull(conn, payload); err != nil {
		return nil, &connectionError{err}
	}
	switch header[0] {
	case kindTree:
		return decode(payload)
	case kindComplex:
		return nil, errTooComplex
	case kindSyntax:
		if size >= 4 {
			return nil, &SyntaxError{Message: string(payload[4:]), Position: int(binary.BigEndian.Uint32(payload))}
		}
	}
	return nil, &connectionError{errors.New("the parser's answer makes no sense")}
}
