package pgproxy

import (
	"encoding/binary"
	"fmt"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/mask"
)

// maxDescription bounds a RowDescription of a source that masks, in bytes: 1,600
// columns with long names fit.
const maxDescription = 1 << 20

// Hider says how the result of one statement is masked, and what may be told of its
// failure.
type Hider interface {
	// Rows makes the masks of a result that the server described so; nil: none of
	// its values can need one. A Refusal means that the description is not what the
	// statement was judged by.
	Rows(fields []pgproto3.FieldDescription) (*mask.Row, *Refusal)
	// Masked names a masked column of the result, or is "".
	Masked() string
	// Error is what is told instead of the server's ErrorResponse; nil: that may be
	// told. ran tells whether the statement may have read anything.
	Error(body []byte, ran bool) *Refusal
}

// shape is how the rows of a result are masked, once the server described it.
type shape struct {
	known   bool
	row     *mask.Row // nil: not at all
	formats []int16
}

// hider is the one of a statement; nil where the source masks nothing.
func (p *Proxy) hider(own Hider) Hider {
	if own != nil {
		return own
	}
	return p.config.Hide
}

// description takes a RowDescription of a source that masks. With quiet it was asked
// for by us.
func (p *Proxy) description(size int, hide Hider, to *shape, quiet bool) error {
	if size > maxDescription {
		return fmt.Errorf("%w: a description of %d bytes", errServer, size)
	}
	if err := p.need(5 + size); err != nil {
		return p.eof(err)
	}
	message := append([]byte(nil), p.b[p.r:p.r+5+size]...)
	var described pgproto3.RowDescription
	if err := described.Decode(message[5:]); err != nil {
		return fmt.Errorf("%w: %v", errServer, err)
	}
	row, refusal := hide.Rows(described.Fields)
	if refusal != nil {
		// The statement may be running: nothing of it may get out.
		return fail{refusal}
	}
	if to != nil {
		to.known, to.row, to.formats = true, row, to.formats[:0]
		for _, f := range described.Fields {
			to.formats = append(to.formats, f.Format)
		}
	}
	if row != nil {
		if err := row.Describe(message[5:]); err != nil {
			return fmt.Errorf("%w: %v", errServer, err)
		}
	}
	if quiet {
		return p.skip(5 + size)
	}
	return p.replace(5+size, message)
}

// hideRow takes a row of n bytes of a source that masks.
func (p *Proxy) hideRow(st *running, n int) error {
	s := &st.shape
	if st.portal != nil {
		s = &st.portal.shape
	}
	switch {
	case !s.known:
		return fail{refuse(stateDenied, "terminating connection: a row came of a result that was not described, and the data source masks values")}
	case s.row == nil:
		return p.through(n)
	}
	if err := p.need(n); err != nil {
		return p.eof(err)
	}
	p.hidden = append(p.hidden[:0], 'D', 0, 0, 0, 0)
	var err error
	if p.hidden, err = s.row.Append(p.hidden, p.b[p.r+5:p.r+n], s.formats); err != nil {
		return fmt.Errorf("%w: %v", errServer, err)
	}
	binary.BigEndian.PutUint32(p.hidden[1:], uint32(len(p.hidden)-1))
	err = p.replace(n, p.hidden)
	if cap(p.hidden) > 1<<20 {
		p.hidden = nil
	}
	return err
}

// describeOwn asks the server for the description of a portal that was bound, for
// ourselves: its rows come without.
func (p *Proxy) describeOwn(name string, opened *portal) error {
	hide := p.hider(opened.statement.part.hide)
	if hide == nil || p.skipping {
		return nil
	}
	b := appendMessage(nil, 'D', "P"+name)
	return p.queue(&expect{kind: 'D', hide: hide, portal: opened}, b)
}
