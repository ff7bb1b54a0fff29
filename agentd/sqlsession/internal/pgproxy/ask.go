package pgproxy

import (
	"context"
	"encoding/binary"
	"errors"
	"strings"
)

// Ask implements Asker. It may only be called between the client's messages.
func (p *Proxy) Ask(_ context.Context, sql string, parameters ...string) ([][]string, error) {
	if p.tx == 'E' {
		return nil, refuse(stateFailed, "current transaction is aborted, commands ignored until end of transaction block")
	}
	if err := p.settle(); err != nil {
		p.broken = err
		return nil, err
	}
	if p.skipping {
		return nil, refuse(stateFailed, "an earlier message of the pipeline failed")
	}
	b := p.batch[:0]
	// A plan of the catalog is not worth compiling: see Startup for what holds inside of the
	// client's transaction, which a question that fails makes fail, as the refusal does
	// that follows.
	var before, after []string
	if p.tx == 'I' && !p.open {
		before, after = []string{"BEGIN READ ONLY", "SET LOCAL jit = off"}, []string{"ROLLBACK"}
	}
	state := p.tx
	for _, sql := range before {
		b = appendQuestion(b, sql)
	}
	b = appendQuestion(b, sql, parameters...)
	for _, sql := range after {
		b = appendQuestion(b, sql)
	}
	statements := len(before) + 1 + len(after)
	if p.open {
		b = appendMessage(b, 'H')
	} else {
		b = appendMessage(b, 'S')
	}
	p.begin()
	defer p.end()
	_, err := p.conn.Write(b)
	var rows [][]string
	if err == nil {
		rows, err = p.askAnswers(3 * statements)
	}
	var refusal *Refusal
	if len(after) > 0 && p.tx != state && (err == nil || errors.As(err, &refusal)) {
		// It failed, and so did what is around it.
		if _, werr := p.conn.Write(appendMessage(nil, 'Q', strings.Join(after, ";"))); werr != nil {
			err = werr
		} else if _, rerr := p.askAnswers(0); rerr != nil {
			err = rerr
		}
	}
	p.batch = b[:0]
	if err != nil && !errors.As(err, &refusal) {
		p.broken = err
	}
	return rows, err
}

// lastError is why the session ends although a question of ours was the last thing
// that it did; nil: it does not.
func (p *Proxy) lastError() error { return p.broken }

// appendQuestion appends a statement of ours, with what names it used closed again: the
// client's own, the unnamed among them, are left alone.
func appendQuestion(b []byte, sql string, parameters ...string) []byte {
	b = appendMessage(b, 'C', "S"+ours) // one that failed left it open
	at := len(b)
	b = append(appendMessage(b, 'P', ours, sql), 0, 0) // no types of parameters
	binary.BigEndian.PutUint32(b[at+1:], uint32(len(b)-at-1))
	at = len(b)
	b = appendMessage(b, 'B', ours, ours)
	b = binary.BigEndian.AppendUint16(b, 0) // all of them as text
	b = binary.BigEndian.AppendUint16(b, uint16(len(parameters)))
	for _, v := range parameters {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(v))), v...)
	}
	b = binary.BigEndian.AppendUint16(b, 0) // so are the results
	binary.BigEndian.PutUint32(b[at+1:], uint32(len(b)-at-1))
	at = len(b)
	b = append(appendMessage(b, 'E', ours), 0, 0, 0, 0)
	binary.BigEndian.PutUint32(b[at+1:], uint32(len(b)-at-1))
	return appendMessage(appendMessage(b, 'C', "P"+ours), 'C', "S"+ours)
}

// askAnswers reads the answers to questions, which close so many names.
func (p *Proxy) askAnswers(closes int) (rows [][]string, failure error) {
	closed := 0
	for {
		t, size, err := p.header()
		if err != nil {
			return nil, err
		}
		if known, err := p.aside(t, size); known || err != nil {
			if err != nil {
				return nil, err
			}
			continue
		}
		body, err := p.peek(size)
		if err != nil {
			return nil, err
		}
		switch t {
		case 'E':
			d := serverError(body)
			failure = refuse(d.GetSql().GetSqlstate(), "the catalog could not be asked: %s", d.GetMessage())
			if s := severity(body); s == "FATAL" || s == "PANIC" {
				p.lastWord(body)
				_ = p.through(5 + size)
				p.pass()
				return nil, errEnded
			}
			p.serverSkips = p.open
		case 'D':
			if size > maxServerMessage || len(rows) == maxAnswers {
				failure = refuse(stateLimit, "the catalog's answer is too long to be understood")
			} else {
				rows = append(rows, texts(body))
			}
		case 'Z':
			if size == 1 {
				p.tx = body[0]
			}
		case '3':
			closed++
		}
		if err := p.skip(5 + size); err != nil {
			return nil, err
		}
		if t == 'Z' || p.open && (closed == closes || t == 'E') {
			return rows, failure
		}
	}
}

// texts reads a DataRow of texts.
func texts(body []byte) []string {
	if len(body) < 2 {
		return nil
	}
	n := int(binary.BigEndian.Uint16(body))
	body = body[2:]
	var values []string
	for range n {
		if len(body) < 4 {
			break
		}
		size := int(int32(binary.BigEndian.Uint32(body)))
		body = body[4:]
		if size < 0 {
			values = append(values, "")
			continue
		}
		size = min(size, len(body))
		values = append(values, strings.ToValidUTF8(string(body[:size]), "\uFFFD"))
		body = body[size:]
	}
	return values
}
