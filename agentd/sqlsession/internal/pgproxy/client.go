package pgproxy

import (
	"encoding/binary"
	"strings"

	"github.com/postern-dev/postern/proto"
)

// maxName bounds the name of a prepared statement or portal in bytes.
const maxName = 256

// dispatch answers one message of the client, whose body was not read yet.
func (p *Proxy) dispatch(t byte, size int) error {
	switch t {
	case 'B': // it may be long
		return p.bind(size)
	case 'd', 'c', 'f': // of a COPY that failed
		return p.takeAway(size)
	case 'Q', 'P':
		if size > maxBody && size <= maxSkipped {
			return p.tooLong(t, size)
		}
	}
	if err := p.takeBody(t, size); err != nil {
		return err
	}
	switch t {
	case 'X':
		return errEnded
	case 'S':
		if size != 0 {
			return protocolError("a Sync with a body")
		}
		return p.sync()
	case 'H':
		if size != 0 {
			return protocolError("a Flush with a body")
		}
		if p.skipping {
			return nil
		}
		return p.settle()
	case 'Q':
		text, rest, ok := cut(p.body)
		if !ok || len(rest) > 0 {
			return protocolError("a Query that does not end where its text does")
		}
		if p.skipping {
			return nil
		}
		return p.query(text)
	case 'P':
		return p.parse()
	case 'D':
		return p.describe()
	case 'E':
		return p.execute()
	case 'C':
		return p.closeNamed()
	case 'F':
		if p.skipping {
			return nil
		}
		return p.refuseCycle("", &Refusal{SQLState: stateUnsupported, Message: "the FunctionCall message is refused: call functions in a statement", Hint: "psql's \\lo_import and the like use it."})
	}
	return protocolError("unknown message type %q", t)
}

// takeAway reads a body and forgets it.
func (p *Proxy) takeAway(size int) error {
	for size > 0 {
		n := min(size, 8<<10)
		if cap(p.body) < n {
			p.body = make([]byte, 8<<10)
		}
		if err := p.take(p.body[:n], false); err != nil {
			return err
		}
		size -= n
	}
	return nil
}

const (
	// maxTold is how much of a text that is too long goes to the log, in bytes.
	maxTold = 4 << 10
	// maxSkipped is how long such a text may be, in bytes: of more we believe that the
	// client speaks something else.
	maxSkipped = 64 << 20
)

// tooLong refuses a Query or Parse that is not looked at, and goes on behind it.
func (p *Proxy) tooLong(t byte, size int) error {
	head := min(size, maxTold)
	if err := p.takeBody(t, head); err != nil {
		return err
	}
	text := p.body
	if t == 'P' {
		_, rest, _ := cut(text)
		text = rest
	}
	told := clip(strings.ToValidUTF8(string(text), "\uFFFD"), maxTold)
	if err := p.takeAway(size - head); err != nil || p.skipping {
		return err
	}
	refusal := refuse(stateLimit, "the text has about %d bytes, more than the %d that are understood", size, MaxText)
	if t == 'P' {
		return p.refuseMessage(told, refusal)
	}
	return p.refuseCycle(told, refusal)
}

// query is a Query: one or several statements.
func (p *Proxy) query(text string) error {
	if err := p.settle(); err != nil { // messages without a Sync go first
		return err
	}
	if p.skipping {
		return nil
	}
	if p.tx == 'E' && !endsTransaction(text) {
		return p.refuseCycle(text, &Refusal{SQLState: stateFailed, Message: failedMessage, Code: proto.CodeSQL})
	}
	j := p.judge(text)
	if err := p.lastError(); err != nil {
		return err
	}
	refusal := j.refusal
	for _, one := range j.parts {
		if refusal == nil {
			refusal = one.describeOnly
		}
	}
	if refusal == nil && p.tx == 'E' && !onlyEnds(j) {
		refusal = &Refusal{SQLState: stateFailed, Message: failedMessage, Code: proto.CodeSQL}
	}
	if refusal != nil {
		return p.refuseCycle(text, refusal)
	}
	x := &expect{kind: 'Q'}
	for i := range j.parts {
		x.query = append(x.query, p.running(j.parts[i], nil))
	}
	if j.rewrite != "" {
		text = j.rewrite
	}
	p.batch = appendMessage(p.batch, 'Q', text)
	p.expects = append(p.expects, x)
	return p.send()
}

const failedMessage = "current transaction is aborted, commands ignored until end of transaction block"

// endsTransaction is a cheap first look: whether a text may end a failed
// transaction. Only such a text is worth a parse.
func endsTransaction(text string) bool {
	text = strings.ToLower(text)
	for _, word := range []string{"commit", "rollback", "end", "abort"} {
		if strings.Contains(text, word) {
			return true
		}
	}
	return strings.TrimSpace(text) == ""
}

// onlyEnds tells whether a text's first statement ends a failed transaction, or
// goes back to a savepoint; what comes behind it is the server's to judge.
func onlyEnds(j *judgement) bool { return len(j.parts) == 0 || j.parts[0].ends }

// refuseCycle answers a Query or FunctionCall that is not sent.
func (p *Proxy) refuseCycle(text string, refusal *Refusal) error {
	if err := p.settle(); err != nil {
		return err
	}
	if p.skipping {
		return nil
	}
	p.denied(text, refusal)
	p.batch = appendMessage(p.batch, 'Q', poison)
	p.expects = append(p.expects, &expect{kind: 'Q', swap: refusal})
	return p.send()
}

// sync is a Sync: the end of a cycle.
func (p *Proxy) sync() error {
	p.batch = appendMessage(p.batch, 'S')
	p.expects = append(p.expects, &expect{kind: 'S'})
	p.open = true
	return p.send()
}

// settle has the server answer all that it was sent, and leaves its cycle open.
func (p *Proxy) settle() error {
	if len(p.expects) == 0 && len(p.batch) == 0 {
		return nil
	}
	p.batch = appendMessage(p.batch, 'H')
	return p.send()
}

// queue adds a message of the extended protocol to the batch.
func (p *Proxy) queue(x *expect, message []byte) error {
	if len(p.batch)+len(message) > maxBatch {
		if err := p.settle(); err != nil || p.skipping {
			return err
		}
	}
	p.batch = append(p.batch, message...)
	p.expects = append(p.expects, x)
	p.open = true
	if len(p.batch) > maxBatch {
		return p.settle() // one long message, which the server is ready for
	}
	return nil
}

// message is the client's message at hand as it came.
func (p *Proxy) message(t byte, body []byte) []byte {
	b := make([]byte, 0, 5+len(body))
	b = binary.BigEndian.AppendUint32(append(b, t), uint32(len(body)+4))
	return append(b, body...)
}

// refuseMessage answers a message of the extended protocol that is not sent.
func (p *Proxy) refuseMessage(text string, refusal *Refusal) error {
	if text != "" {
		p.denied(text, refusal)
	}
	if p.serverSkips {
		p.out.add(appendError(nil, "ERROR", refusal))
		p.skipping, p.serverSkips = true, false
		return nil
	}
	if err := p.queue(&expect{kind: 'P', swap: refusal}, append(p.parseMessage(poisoned, poison), 0, 0)); err != nil {
		return err
	}
	return p.settle()
}
