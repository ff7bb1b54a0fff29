package child

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"
)

func (x *execution) sendExecute() error {
	bound := make([][]byte, len(x.text.Args))
	for i, a := range x.text.Args {
		if a.Text != nil {
			bound[i] = append([]byte{}, *a.Text...) // an empty text is not NULL
		}
	}
	err := x.wire.send(
		&pgproto3.Bind{PreparedStatement: statementName, Parameters: bound, ResultFormatCodes: x.batch.formats()},
		&pgproto3.Execute{},
		&pgproto3.Sync{},
	)
	if err != nil {
		return err
	}
	return x.wire.flush()
}

// stream takes the rows until the server is done with the statement.
func (x *execution) stream() cycleEnd {
	c, b := x.wire, x.batch
	var refusal *pgproto3.ErrorResponse
	for {
		if x.drained != nil {
			return x.waitDrained()
		}
		if err := x.ready(5); err != nil {
			if refusal != nil {
				return cycleEnd{refusal, nil}
			}
			return cycleEnd{nil, err}
		}
		if x.drained != nil {
			continue
		}
		if c.in[c.r] == 'D' {
			if err := x.row(); err != nil {
				return cycleEnd{refusal, err}
			}
			continue
		}
		t, body, err := c.one()
		if err != nil {
			if refusal != nil {
				return cycleEnd{refusal, nil}
			}
			return cycleEnd{nil, err}
		}
		switch t {
		case 0: // an aside
		case 'Z':
			return cycleEnd{refusal, nil}
		case 'E':
			refusal = decodeError(body)
		case 'C':
			var complete pgproto3.CommandComplete
			if complete.Decode(body) == nil {
				x.tag = clean(string(complete.CommandTag))
			}
		case 'G', 'W':
			if err := c.send(&pgproto3.CopyFail{Message: "COPY is not supported"}, &pgproto3.Sync{}); err != nil {
				return cycleEnd{refusal, err}
			}
			if err := c.flush(); err != nil {
				return cycleEnd{refusal, err}
			}
		case '2', 'n', 'I', 's', 'H', 'c', 'd':
		default:
			return cycleEnd{refusal, fmt.Errorf("%w: message %q", errProtocol, t)}
		}
		if b.full() {
			if err := b.flush(); err != nil {
				return cycleEnd{refusal, err}
			}
		}
	}
}

// ready makes n bytes available. While the database pauses, rows that wait
// are sent on.
func (x *execution) ready(n int) error {
	c := x.wire
	if c.w-c.r >= n {
		return nil
	}
	c.room(n)
	for c.w-c.r < n {
		if c.bulk != nil && x.batch.flushed > bulkAfter && !x.st.isStopped() {
			err := c.fillBulk()
			if err == nil {
				c.room(n)
				continue
			}
			if !errors.Is(err, errQuiet) {
				return err
			}
		}
		armed := x.batch.rows > 0 && !x.st.isStopped()
		if armed {
			delay := laterDelay
			if x.batch.first {
				delay = firstDelay
			}
			if err := c.conn.SetReadDeadline(time.Now().Add(delay)); err != nil {
				return err
			}
		}
		err := c.fill()
		if armed {
			if err := c.conn.SetReadDeadline(time.Time{}); err != nil {
				return err
			}
		}
		if armed && errors.Is(err, os.ErrDeadlineExceeded) {
			if err = x.batch.flush(); err == nil && x.drained != nil {
				return nil // somebody else reads now
			}
		}
		if err != nil {
			return err
		}
		c.room(n)
	}
	return nil
}

// row takes one DataRow, or passes over it when no more rows are wanted.
func (x *execution) row() error {
	c, b := x.wire, x.batch
	_, size, err := c.header()
	if err != nil {
		return err
	}
	if !x.st.isStopped() {
		switch {
		case b.total() >= x.request.MaxRows:
			x.st.stop(rowLimit)
		case size >= giantRow:
			if !b.fits(x.request.MaxBytes, size, nil) {
				x.st.stop(byteLimit)
				break
			}
			if err := b.flush(); err != nil || x.drained != nil {
				return err
			}
			c.r += 5
			if err := x.taken(b.addFrom(c, size)); err != nil {
				return err
			}
			return b.flush()
		default:
			if err := x.ready(5 + size); err != nil || x.drained != nil {
				return err
			}
			body := c.in[c.r+5 : c.r+5+size]
			if !b.fits(x.request.MaxBytes, size, body) {
				x.st.stop(byteLimit)
				break
			}
			c.r += 5 + size
			if err := x.taken(b.add(body)); err != nil {
				return err
			}
			if b.full() {
				return b.flush()
			}
			return nil
		}
	}
	return c.skip(5 + size)
}

// taken looks at how a row was taken: a value that can't be held stops the
// statement, and the rows before it stay good.
func (x *execution) taken(err error) error {
	if errors.As(err, &x.value) {
		x.st.stop(badValue)
		return nil
	}
	return err
}

// stalled is called when the result's reader is slow and the sink has no free
// buffer. If the statement is stopped meanwhile, the database is freed at
// once: a backend that waits for us to read sees no cancel.
func (x *execution) stalled(free <-chan []byte) []byte {
	if x.drained == nil {
		select {
		case b := <-free:
			return b
		case <-x.st.stopped:
		}
		x.drained = make(chan cycleEnd, 1)
		if err := x.wire.endBulk(); err != nil {
			x.drained <- cycleEnd{nil, err}
			return <-free
		}
		go func() {
			refusal, err := x.wire.untilReady(nil)
			x.drained <- cycleEnd{refusal, err}
		}()
	}
	return <-free
}

// waitDrained waits for the goroutine of stalled, if there is one.
func (x *execution) waitDrained() cycleEnd {
	if x.drained == nil {
		return cycleEnd{}
	}
	end := <-x.drained
	x.drained <- end
	return end
}
