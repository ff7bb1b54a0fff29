package pgproxy

import (
	"encoding/binary"

	"github.com/postern-dev/postern/proto"
)

// This file answers the messages of the extended protocol but for Bind: Parse, Describe,
// Close and Execute.

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
