package pgproxy

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/proto"
)

// write writes to the server, which reads, as nothing waits for us.
func (p *Proxy) write(b []byte) error {
	_, err := p.conn.Write(b)
	return err
}

// send sends the batch and hands on the answers, until the server owes none.
func (p *Proxy) send() error {
	if refusal, err := p.tellIntents(); err != nil {
		return err
	} else if refusal != nil {
		return p.withdraw(refusal)
	}
	p.begin()
	defer p.end()
	if err := p.holdReadOnly(); err != nil {
		return err
	}
	p.sent = true
	if err := p.write(p.batch); err != nil {
		return p.lastWords(err)
	}
	if cap(p.batch) > 4*maxBatch {
		p.batch = nil
	}
	p.batch = p.batch[:0]
	p.mustDrain = false
	n := 0
	for _, x := range p.expects {
		if x.runs != nil {
			n++
		}
		n += len(x.query)
	}
	p.budget.Store(int64(p.config.Timeout) * int64(max(n, 1)))
	p.turn()
	for len(p.expects) > 0 {
		if err := p.answer(); err != nil {
			return err
		}
	}
	p.endBulk()
	p.pass()
	return nil
}

// reportsReadOnly is the first version of the server that tells when
// default_transaction_read_only changes.
const reportsReadOnly = 14

// holdReadOnly makes sure that what comes next runs read only, on a server that would not
// tell if a function that the policy allows had switched that off for what follows. It is
// said before each cycle that begins outside of a transaction, and costs a round trip.
func (p *Proxy) holdReadOnly() error {
	if p.config.ReadWrite || p.config.Version >= reportsReadOnly || p.tx != 'I' || p.sent {
		return nil
	}
	if err := p.write(appendMessage(nil, 'Q', "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")); err != nil {
		return p.lastWords(err)
	}
	for {
		t, size, err := p.header()
		if err != nil {
			return p.eof(err)
		}
		if known, err := p.aside(t, size); err != nil {
			return err
		} else if known {
			continue
		}
		body, err := p.peek(size)
		if err != nil {
			return p.eof(err)
		}
		if t == 'E' {
			if s := severity(body); s == "FATAL" || s == "PANIC" {
				p.lastWord(body)
				_ = p.through(5 + size)
				p.pass()
				return errEnded
			}
			return fail{refuse(stateDenied, "terminating connection: the transaction can't be kept read only: %s", serverError(body).GetMessage())}
		}
		if err := p.skip(5 + size); err != nil {
			return p.eof(err)
		}
		if t == 'Z' {
			return nil
		}
	}
}

// lastWords looks for what the server said before a write to it failed.
func (p *Proxy) lastWords(failure error) error {
	for {
		t, size, err := p.header()
		if err != nil {
			return failure
		}
		if t == 'E' {
			body, err := p.peek(size)
			if err != nil {
				return failure
			}
			p.lastWord(body)
			_ = p.through(5 + size)
			p.pass()
			return failure
		}
		if p.skip(5+size) != nil {
			return failure
		}
	}
}

// withdraw fails a batch that must not be sent, as its intents are not in the log.
func (p *Proxy) withdraw(refusal *Refusal) error {
	for _, st := range p.intents {
		st.intended = false
	}
	p.intents = nil
	query := len(p.expects) > 0 && p.expects[0].kind == 'Q'
	synced := len(p.expects) > 0 && p.expects[len(p.expects)-1].kind == 'S'
	p.expects, p.batch = nil, p.batch[:0]
	clear(p.staged)
	clear(p.stagedPortals)
	if query {
		p.batch = appendMessage(p.batch, 'Q', poison)
		p.expects = append(p.expects, &expect{kind: 'Q', swap: refusal})
		return p.send()
	}
	p.batch = append(p.batch, append(p.parseMessage(poisoned, poison), 0, 0)...)
	p.expects = append(p.expects, &expect{kind: 'P', swap: refusal})
	p.open = true
	if synced {
		return p.sync()
	}
	return p.settle()
}

// turn makes the statement at the head of what the server owes the current one.
func (p *Proxy) turn() {
	var st *running
	if len(p.expects) > 0 {
		if x := p.expects[0]; x.kind == 'E' {
			st = x.runs
		} else if x.kind == 'Q' && x.next < len(x.query) {
			st = x.query[x.next]
		}
	}
	if st == p.current {
		return
	}
	p.current = st
	if st == nil {
		p.startedAt.Store(0)
		return
	}
	st.started = time.Now()
	st.before = *st.tally
	p.announced.Store(false)
	p.shownSeq.Store(st.seq)
	p.startedAt.Store(st.started.UnixNano())
}

// pop goes on to the next of what the server owes.
func (p *Proxy) pop(done bool) {
	x := p.expects[0]
	p.expects = p.expects[1:]
	if done && x.done != nil {
		x.done()
	}
	p.turn()
}

// answer takes one message of the server's.
func (p *Proxy) answer() error {
	t, size, err := p.header()
	if err != nil {
		return p.eof(err)
	}
	if t == 'D' || t == 'd' {
		return p.row(5 + size)
	}
	if known, err := p.aside(t, size); known || err != nil {
		return err
	}
	switch t {
	case 'E':
		return p.failure(size)
	case 'Z':
		return p.ready(size)
	}
	if p.swallow {
		return p.skip(5 + size)
	}
	x := p.expects[0]
	ok := false
	switch t {
	case '1':
		ok = x.kind == 'P' && x.swap == nil
	case '2':
		ok = x.kind == 'B'
	case '3':
		ok = x.kind == 'C'
	case 'n':
		ok = x.kind == 'D'
	case 'T':
		ok = x.kind == 'D' || x.kind == 'Q' || x.kind == 'E'
	case 't':
		ok = x.kind == 'D'
	case 'C', 'I', 's':
		ok = x.kind == 'E' || x.kind == 'Q' && t != 's'
	case 'G', 'H', 'W', 'c':
		ok = (x.kind == 'E' || x.kind == 'Q') && t != 'W'
	}
	if !ok {
		return fmt.Errorf("%w: message %q out of turn", errServer, t)
	}
	switch t {
	case 'C', 'I', 's':
		return p.complete(t, size)
	case 'G':
		return p.copyIn(5 + size)
	case 'c':
		if p.current != nil && p.current.dropped {
			return p.skip(5 + size) // an error takes its place
		}
	}
	if x.quiet {
		if err := p.skip(5 + size); err != nil {
			return p.eof(err)
		}
		p.pop(true)
		return nil
	}
	switch {
	case t == 'n' && x.portal != nil:
		x.portal.shape = shape{known: true} // no rows come
		if err := p.skip(5 + size); err != nil {
			return p.eof(err)
		}
		p.pop(true)
		return nil
	case t == 'T' && x.hide != nil:
		var to *shape
		if x.portal != nil {
			to = &x.portal.shape
		}
		if err := p.description(size, x.hide, to, x.portal != nil); err != nil {
			return err
		}
		p.pop(true)
		return nil
	case t == 'T' && p.config.Hide != nil:
		if p.current == nil {
			return fmt.Errorf("%w: message %q out of turn", errServer, t)
		}
		return p.description(size, p.hider(p.current.hide), &p.current.shape, false)
	}
	if err := p.through(5 + size); err != nil {
		return p.eof(err)
	}
	switch {
	case t == '1', t == '2', t == '3', t == 'n', t == 'T' && x.kind == 'D':
		p.pop(true)
	}
	return nil
}

// eof says what the end of the connection means.
func (p *Proxy) eof(err error) error {
	if p.fatal != nil && (errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)) {
		return errEnded
	}
	return err
}

// row takes a row, n bytes of protocol, as far as the limits go.
func (p *Proxy) row(n int) error {
	st := p.current
	if st == nil && !p.swallow {
		return fmt.Errorf("%w: a row out of turn", errServer)
	}
	if p.swallow || p.stopped.Load() {
		if st != nil {
			st.dropped = true
		}
		return p.skip(n)
	}
	c := st.tally
	switch {
	case c.rows >= p.config.MaxRows:
		st.dropped = true
		p.Stop(rowLimit, 0)
		return p.skip(n)
	case c.bytes+uint64(n) > p.config.MaxBytes:
		st.dropped = true
		p.Stop(byteLimit, 0)
		return p.skip(n)
	}
	c.rows++
	c.bytes += uint64(n)
	if c.rows-st.before.rows == bulkAfter {
		p.bulk = true
	}
	if p.config.Hide != nil {
		return p.hideRow(st, n)
	}
	return p.through(n)
}

// stopError is what the client is told instead of the server's word that it was
// cancelled; nil: the server's word will do.
func (p *Proxy) stopError() *Refusal {
	p.mu.Lock()
	reason := p.reason
	p.mu.Unlock()
	switch reason {
	case rowLimit:
		return &Refusal{SQLState: stateLimit, Message: fmt.Sprintf("the result has more than %d rows, the data source's limit: the first of them were delivered", p.config.MaxRows), Code: proto.CodeRowLimit}
	case byteLimit:
		return &Refusal{SQLState: stateLimit, Message: fmt.Sprintf("the result has more than %d bytes, the data source's limit: the rows that fit were delivered", p.config.MaxBytes), Code: proto.CodeByteLimit}
	case frame.TimedOut:
		return &Refusal{SQLState: stateCanceled, Message: fmt.Sprintf("canceling statement due to statement timeout: the data source's limit is %s", p.config.Timeout), Code: proto.CodeTimeout}
	case frame.Draining:
		return &Refusal{SQLState: stateCanceled, Message: "canceling statement: the agent or its data source goes away", Code: proto.CodeUnavailable}
	}
	return nil
}

// complete takes the end of a statement that succeeded: CommandComplete, an empty
// query or a portal that has more.
func (p *Proxy) complete(t byte, size int) error {
	tag := ""
	if t == 'C' {
		body, err := p.peek(size)
		if err != nil {
			return p.eof(err)
		}
		tag, _, _ = cut(body)
	}
	x, st := p.expects[0], p.current
	if st != nil && st.dropped {
		return p.tooLate(5+size, tag)
	}
	if st != nil {
		p.finish(st, tag, nil)
		p.settled(st, tag)
	}
	if t == 'C' && st != nil && st.explains {
		err := p.replace(5+size, appendMessage(nil, 'C', "EXPLAIN"))
		if err != nil {
			return p.eof(err)
		}
	} else if err := p.through(5 + size); err != nil {
		return p.eof(err)
	}
	if x.kind == 'Q' {
		x.next++
		p.turn()
		return nil
	}
	p.pop(true)
	return nil
}

// tooLate is for a statement that succeeded although it was stopped, after rows of it
// were left out: to the client it failed, so the rest of its cycle fails, too.
func (p *Proxy) tooLate(n int, tag string) error {
	refusal := p.stopError()
	if refusal == nil {
		refusal = &Refusal{SQLState: stateCanceled, Message: "canceling statement due to user request", Code: proto.CodeCancelled}
	}
	x := p.expects[0]
	if p.config.ReadWrite {
		rest := x.query[min(x.next+1, len(x.query)):]
		for _, later := range p.expects[1:] {
			if later.runs != nil {
				rest = append(rest, later.runs)
			}
		}
		for _, later := range rest {
			if later.write {
				p.finish(p.current, tag, refusal.detail())
				p.current = nil
				refusal.Message += "; the statements behind it in the same message may have been carried out: the session ends"
				return fail{refusal}
			}
		}
	}
	p.finish(p.current, "", refusal.detail())
	p.current = nil
	if err := p.replace(n, appendError(nil, "ERROR", refusal)); err != nil {
		return p.eof(err)
	}
	p.swallow, p.mustFail = true, true
	p.startedAt.Store(0)
	return p.afterError()
}

// afterError drops what the server does not answer to after an error.
func (p *Proxy) afterError() error {
	clear(p.staged)
	clear(p.stagedPortals)
	x := p.expects[0]
	if x.kind == 'Q' {
		x.next = len(x.query)
		p.turn()
		return nil // ReadyForQuery comes
	}
	for len(p.expects) > 0 && p.expects[0].kind != 'S' {
		p.expects = p.expects[1:]
	}
	p.intents = nil
	p.turn()
	p.skipping = len(p.expects) == 0
	return nil
}

// failure takes an ErrorResponse.
func (p *Proxy) failure(size int) error {
	body, err := p.peek(size)
	if err != nil {
		return p.eof(err)
	}
	if s := severity(body); s == "FATAL" || s == "PANIC" {
		p.lastWord(body)
		if st := p.current; st != nil {
			p.finish(st, "", p.fatal.Error)
			p.current = nil
		}
		if err := p.through(5 + size); err != nil {
			return p.eof(err)
		}
		p.pass()
		return errEnded
	}
	if p.swallow {
		return p.skip(5 + size)
	}
	x, st := p.expects[0], p.current
	refusal := x.swap
	if refusal == nil && p.stopped.Load() && strings.HasPrefix(serverError(body).GetSql().GetSqlstate(), "57014") {
		refusal = p.stopError()
	}
	if refusal == nil && p.config.Hide != nil {
		hide := p.config.Hide
		if st != nil {
			hide = p.hider(st.hide)
		}
		refusal = hide.Error(body, st != nil || x.kind == 'B')
	}
	if refusal == nil && p.config.Discreet != nil {
		refusal = p.config.Discreet(body)
	}
	if st != nil {
		detail := serverError(body)
		if refusal != nil {
			detail = refusal.detail()
		}
		p.finish(st, "", detail)
		p.current = nil
	}
	switch {
	case refusal != nil:
		err = p.replace(5+size, appendError(nil, "ERROR", refusal))
	default:
		err = p.through(5 + size)
	}
	if err != nil {
		return p.eof(err)
	}
	return p.afterError()
}

// ready takes ReadyForQuery, the end of a cycle.
func (p *Proxy) ready(size int) error {
	body, err := p.peek(size)
	if err != nil {
		return p.eof(err)
	}
	if size != 1 || len(p.expects) == 0 || p.expects[0].kind != 'S' && p.expects[0].kind != 'Q' {
		return fmt.Errorf("%w: ready out of turn", errServer)
	}
	p.tx = body[0]
	if p.mustFail && p.tx == 'T' {
		// The client was told of an error: its transaction has failed.
		if err := p.skip(5 + size); err != nil {
			return p.eof(err)
		}
		p.mustFail, p.swallow = false, true
		p.expects[0] = &expect{kind: 'Q'}
		return p.write(appendMessage(nil, 'Q', poison))
	}
	p.swallow, p.mustFail, p.open, p.skipping, p.sent = false, false, false, false, false
	clear(p.staged)
	clear(p.stagedPortals)
	clear(p.declaring)
	if p.tx == 'I' {
		clear(p.portals)
		clear(p.cursors)
		if p.ownPath { // it was set for the transaction, or is set back
			p.ownPath = false
			p.epoch++
			p.pathKnown = false
		}
	}
	if err := p.through(5 + size); err != nil {
		return p.eof(err)
	}
	p.pop(true)
	return nil
}

// settled draws the conclusions from a statement that succeeded.
func (p *Proxy) settled(st *running, tag string) {
	one := st.part
	if one.path {
		p.epoch++
		p.ownPath = true
		p.pathKnown = false
	}
	switch {
	case one.forgets == "*":
		for name := range p.statements {
			p.keep(name, nil)
		}
	case one.forgets != "":
		p.keep(one.forgets, nil)
	case one.prepares != "" && tag == "PREPARE":
		if len(p.statements) < maxStatements && p.statementText+len(one.sql) <= maxStatementText {
			p.keep(one.prepares, &preparedStatement{text: one.sql, part: one})
		}
	case one.declares != "" && len(p.cursors) < maxStatements:
		p.cursors[one.declares] = st.declared
	}
	if p.config.ReadWrite && one.write && one.data {
		switch first, _, _ := strings.Cut(tag, " "); first {
		case "SELECT", "INSERT", "UPDATE", "DELETE", "MERGE", "COPY":
		default:
			p.epoch++ // names may be of something else now
		}
	}
}

// portal finds what an Execute runs, and what counts its rows.
func (p *Proxy) portal(name string) (*preparedStatement, *tally) {
	if staged, ok := p.stagedPortals[name]; ok {
		if staged == nil {
			return nil, nil
		}
		return staged.statement, staged.tally
	}
	if known := p.portals[name]; known != nil {
		return known.statement, known.tally
	}
	return nil, p.cursors[name]
}

// running is a statement that is about to be sent.
func (p *Proxy) running(one part, counted *tally) *running {
	if counted == nil && one.fetches != "" && p.declaring[one.fetches] != nil {
		counted = p.declaring[one.fetches]
	}
	if counted == nil && one.fetches != "" {
		counted = p.cursors[one.fetches]
	}
	if counted == nil {
		counted = &tally{}
	}
	p.seq++
	st := &running{part: one, seq: p.seq, tally: counted, started: time.Now()}
	if one.declares != "" {
		st.declared = &tally{}
		if p.declaring == nil {
			p.declaring = make(map[string]*tally)
		}
		p.declaring[one.declares] = st.declared
	}
	return st
}
