package pgproxy

import (
	"encoding/binary"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgplan"
	"github.com/postern-dev/postern/proto"
)

// bind is a Bind, whose head is looked at and whose values pass through.
func (p *Proxy) bind(size int) error {
	if size > maxBind {
		return protocolError("a Bind has %d bytes, more than %d", size, maxBind)
	}
	if p.skipping {
		return p.takeAway(size)
	}
	whole := size <= maxBatch/2
	head := size
	if !whole {
		head = min(size, 2*(maxName+1))
	}
	if err := p.takeBody('B', head); err != nil {
		return err
	}
	name, rest, ok := cut(p.body)
	statement, _, ok2 := cut(rest)
	if !ok || !ok2 || len(name) > maxName || len(statement) > maxName {
		return protocolError("a malformed Bind")
	}
	message := append([]byte(nil), p.body...) // the buffer is used again
	refusal, failure := p.mayBind(name, statement)
	if failure != nil {
		return failure
	}
	if made := p.statement(statement); refusal == nil && made != nil && made.part.bracket != nil {
		switch {
		case !whole:
			refusal = refuse(stateLimit, "the values have %d bytes, more than can be looked at on a data source that shows metadata only", size)
		case !plainValues(message):
			refusal = made.part.bracket
		}
	}
	if refusal != nil || p.skipping {
		if err := p.takeAway(size - head); err != nil || p.skipping {
			return err
		}
		return p.refuseMessage("", refusal)
	}
	opened := &portal{statement: p.statement(statement), tally: &tally{}}
	p.stagedPortals[name] = opened
	done := func() { p.portals[name] = opened }
	var err error
	if whole {
		err = p.queue(&expect{kind: 'B', done: done}, p.message('B', message))
	} else {
		err = p.bindLong(size, message, &expect{kind: 'B', done: done})
	}
	if err != nil {
		return err
	}
	return p.describeOwn(name, opened)
}

// mayBind looks again at a statement whose verdict has aged.
func (p *Proxy) mayBind(name, statement string) (*Refusal, error) {
	if p.mustDrain {
		if err := p.settle(); err != nil || p.skipping {
			return nil, err
		}
	}
	made := p.statement(statement)
	switch {
	case name == ours:
		return refuse(stateDenied, "the name %q of a portal is taken", name), nil
	case made != nil && made.part.describeOnly != nil && p.config.Guard.Mode == "metadata":
		return made.part.describeOnly, nil // to bind is to plan
	case made == nil:
		message := "prepared statement \"" + clip(statement, 64) + "\" does not exist"
		if statement == "" {
			message = "unnamed prepared statement does not exist"
		}
		return &Refusal{SQLState: stateNoStatement, Message: message, Code: proto.CodeSQL}, nil
	}
	again := made.part.explains && made.bound
	made.bound = true
	if made.j != nil && made.j.fresh(p.epoch) && !again || p.tx == 'E' {
		return nil, nil // in a failed transaction the server binds only what ends it
	}
	j := p.judge(made.text)
	if err := p.lastError(); err != nil {
		return nil, err
	}
	if j.refusal != nil {
		p.denied(made.text, j.refusal)
		return j.refusal, nil
	}
	made.j = j
	if len(j.parts) == 1 && made.part.prepares == "" {
		made.part = j.parts[0]
	}
	if made.part.explains { // with a plan of now
		b := append(p.parseMessage(statement, j.rewrite), made.types...)
		binary.BigEndian.PutUint32(b[1:], uint32(len(b)-1))
		if err := p.queue(&expect{kind: 'C', quiet: true}, appendMessage(nil, 'C', "S"+statement)); err != nil || p.skipping {
			return nil, err
		}
		return nil, p.queue(&expect{kind: 'P', quiet: true}, b)
	}
	return nil, nil
}

// scalar is the longest value in binary that is no array, row or range, in bytes: those
// have a head and, but for what is empty, the length of something in them.
const scalar = 8

// plainValues tells whether none of a Bind's values is an array, a row or a range: they
// begin with a bracket.
func plainValues(body []byte) bool {
	_, rest, _ := cut(body)
	_, rest, ok := cut(rest)
	if !ok || len(rest) < 2 {
		return false
	}
	n := int(binary.BigEndian.Uint16(rest))
	rest = rest[2:]
	if len(rest) < 2*n+2 {
		return false
	}
	formats := rest[:2*n]
	values := int(binary.BigEndian.Uint16(rest[2*n:]))
	rest = rest[2*n+2:]
	for i := range values {
		if len(rest) < 4 {
			return false
		}
		size := int(int32(binary.BigEndian.Uint32(rest)))
		rest = rest[4:]
		if size < 0 {
			continue
		}
		if size > len(rest) {
			return false
		}
		value := rest[:size]
		rest = rest[size:]
		var format uint16
		switch {
		case n == 1:
			format = binary.BigEndian.Uint16(formats)
		case i < n:
			format = binary.BigEndian.Uint16(formats[2*i:])
		}
		if format != 0 && size > scalar || format == 0 && pgplan.Composite(string(value)) {
			return false
		}
	}
	return true
}

// bindLong sends a Bind in pieces to a server that has nothing else to do.
func (p *Proxy) bindLong(size int, head []byte, x *expect) error {
	if err := p.settle(); err != nil {
		return err
	}
	if p.skipping {
		return p.takeAway(size - len(head))
	}
	if err := p.holdReadOnly(); err != nil {
		return err
	}
	p.sent = true
	b := binary.BigEndian.AppendUint32([]byte{'B'}, uint32(size+4))
	if err := p.write(append(b, head...)); err != nil {
		return err
	}
	if err := p.stream(size - len(head)); err != nil {
		return err
	}
	p.expects = append(p.expects, x)
	p.open = true
	return p.settle()
}

// stream sends on what the client sends next.
func (p *Proxy) stream(n int) error {
	if cap(p.body) < 16<<10 {
		p.body = make([]byte, 16<<10)
	}
	piece := p.body[:cap(p.body)]
	piece = piece[:min(len(piece), 64<<10)]
	for n > 0 {
		k := min(n, len(piece))
		if err := p.take(piece[:k], false); err != nil {
			return err
		}
		if err := p.write(piece[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}
