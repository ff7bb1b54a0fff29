package pgproxy

import (
	"encoding/binary"
	"strings"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgplan"
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

// parseMessage is a Parse without its parameter types' count and types, whose two
// bytes or more the caller appends.
func (p *Proxy) parseMessage(name, text string) []byte {
	b := appendMessage(nil, 'P', name, text)
	binary.BigEndian.PutUint32(b[1:], uint32(len(b)+2-1))
	return b
}

// parse is a Parse.
func (p *Proxy) parse() error {
	name, rest, ok := cut(p.body)
	text, types, ok2 := cut(rest)
	if !ok || !ok2 || len(types) < 2 || len(types) != 2+4*int(binary.BigEndian.Uint16(types)) || len(name) > maxName {
		return protocolError("a malformed Parse")
	}
	if p.skipping {
		return nil
	}
	types = append([]byte(nil), types...) // the body is used again
	if p.mustDrain {
		if err := p.settle(); err != nil || p.skipping {
			return err
		}
	}
	if p.tx == 'E' && !endsTransaction(text) {
		return p.refuseMessage("", &Refusal{SQLState: stateFailed, Message: failedMessage, Code: proto.CodeSQL})
	}
	j := p.judge(text)
	if err := p.lastError(); err != nil {
		return err
	}
	if p.skipping { // found out while the server was asked
		return nil
	}
	refusal := j.refusal
	switch {
	case refusal != nil:
	case len(j.parts) > 1:
		refusal = &Refusal{SQLState: stateSyntax, Message: "cannot insert multiple commands into a prepared statement", Code: proto.CodeSQL}
	case name == ours || name == poisoned:
		refusal = refuse(stateDenied, "the name %q of a prepared statement is taken", name)
	case name != "" && len(p.statements) >= maxStatements, name != "" && p.statementText+len(text) > maxStatementText:
		refusal = refuse(stateLimit, "the session has too many prepared statements: close some")
	case p.tx == 'E' && !onlyEnds(j):
		refusal = &Refusal{SQLState: stateFailed, Message: failedMessage, Code: proto.CodeSQL}
	}
	if refusal != nil {
		return p.refuseMessage(text, refusal)
	}
	made := &preparedStatement{text: text, j: j, types: types}
	if len(j.parts) == 1 {
		made.part = j.parts[0]
	}
	if refusal, err := p.judgeTypes(types[2:], &made.part); err != nil || p.skipping {
		return err
	} else if refusal != nil {
		return p.refuseMessage(text, refusal)
	}
	p.staged[name] = made
	sent := text
	if j.rewrite != "" {
		sent = j.rewrite
	}
	b := appendMessage(nil, 'P', name, sent)
	b = append(b, types...)
	binary.BigEndian.PutUint32(b[1:], uint32(len(b)-1))
	return p.queue(&expect{kind: 'P', done: func() { p.keep(name, made) }}, b)
}

// keep notes a prepared statement that the server has, or (nil) has no more.
func (p *Proxy) keep(name string, made *preparedStatement) {
	if old := p.statements[name]; old != nil {
		p.statementText -= len(old.text)
		delete(p.statements, name)
	}
	if made != nil {
		p.statements[name] = made
		p.statementText += len(made.text)
	}
}

// statement is the one that a name stands for, once what was sent is done.
func (p *Proxy) statement(name string) *preparedStatement {
	if made, ok := p.staged[name]; ok {
		return made
	}
	return p.statements[name]
}

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

// describe is a Describe.
func (p *Proxy) describe() error {
	kind, name, ok := p.named()
	if !ok {
		return protocolError("a malformed Describe")
	}
	if p.skipping {
		return nil
	}
	if name == ours || kind == 'S' && name == poisoned {
		return p.refuseMessage("", refuse(stateNoStatement, "the name %q is taken", name))
	}
	x := &expect{kind: 'D'}
	if p.config.Hide != nil {
		made := p.statement(name)
		if kind == 'P' {
			made, _ = p.portal(name)
		}
		x.hide = p.config.Hide
		if made != nil {
			x.hide = p.hider(made.part.hide)
		}
	}
	return p.queue(x, p.message('D', p.body))
}

// named reads the body of a Describe or a Close.
func (p *Proxy) named() (kind byte, name string, ok bool) {
	if len(p.body) < 2 || p.body[0] != 'S' && p.body[0] != 'P' {
		return 0, "", false
	}
	name, rest, ok := cut(p.body[1:])
	return p.body[0], name, ok && len(rest) == 0 && len(name) <= maxName
}

// closeNamed is a Close.
func (p *Proxy) closeNamed() error {
	kind, name, ok := p.named()
	if !ok {
		return protocolError("a malformed Close")
	}
	if p.skipping {
		return nil
	}
	x := &expect{kind: 'C'}
	if kind == 'S' {
		p.staged[name] = nil
		x.done = func() { p.keep(name, nil) }
	} else {
		p.stagedPortals[name] = nil
		x.done = func() { delete(p.portals, name) }
	}
	return p.queue(x, p.message('C', p.body))
}

// execute is an Execute.
func (p *Proxy) execute() error {
	name, rest, ok := cut(p.body)
	if !ok || len(rest) != 4 || len(name) > maxName {
		return protocolError("a malformed Execute")
	}
	if p.skipping {
		return nil
	}
	message := p.message('E', p.body)
	made, counted := p.portal(name)
	one := part{sql: "(portal " + clip(name, 64) + ")"}
	if made != nil {
		one = made.part
		if one.sql == "" {
			one.sql = made.text
		}
	} else if name == ours {
		return p.refuseMessage("", refuse(stateDenied, "the name %q of a portal is taken", name))
	}
	if one.describeOnly != nil {
		return p.refuseMessage(one.sql, one.describeOnly)
	}
	if made == nil && p.config.Hide != nil {
		return p.refuseMessage(one.sql, refuse(stateUnsupported, "the portal is a cursor's: use FETCH, as the data source masks values"))
	}
	st := p.running(one, counted)
	if made != nil {
		if st.portal = p.portals[name]; p.stagedPortals[name] != nil {
			st.portal = p.stagedPortals[name]
		}
	}
	if one.write {
		p.intents = append(p.intents, st)
	}
	p.mustDrain = p.mustDrain || one.path
	x := &expect{kind: 'E', runs: st}
	return p.queue(x, message)
}
