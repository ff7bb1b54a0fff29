package pgproxy

import (
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/wirestream"
)

// event begins what the log and the history are told of a statement.
func (p *Proxy) event(st *running, state posternv1.WireEvent_State) *posternv1.WireEvent {
	text := st.sql
	if p.config.Redact != nil {
		text = p.config.Redact(text)
	}
	if len(text) > wirestream.MaxText {
		mark := fmt.Sprintf("… (cut, %d bytes in all)", len(text))
		text = strings.TrimSuffix(clip(text, wirestream.MaxText-len(mark)-4), "…") + mark
	}
	return &posternv1.WireEvent{
		StatementId: fmt.Sprintf("%s_%d", p.config.SessionID, st.seq), State: state, Sql: text, Verdict: "allowed",
		Started: timestamppb.New(st.started),
	}
}

// announce tells that a statement runs.
func (p *Proxy) announce(st *running) {
	if st.told {
		return
	}
	st.told = true
	p.announced.Store(true)
	_ = p.out.message(wirestream.Event, p.event(st, posternv1.WireEvent_STATE_RUNNING)) // it is always small enough
}

// finish tells how a statement ended; before the client hears of it.
func (p *Proxy) finish(st *running, tag string, failure *posternv1.ErrorDetail) {
	if st.quiet && failure == nil && !st.told {
		return
	}
	e := p.event(st, posternv1.WireEvent_STATE_ENDED)
	e.Duration = durationpb.New(time.Since(st.started))
	e.Rows, e.Bytes = st.tally.rows-st.before.rows, st.tally.bytes-st.before.bytes
	e.CommandTag, e.Error = clip(tag, 64), failure
	if failure != nil && p.config.Redact != nil {
		failure.Message = p.config.Redact(failure.Message)
	}
	st.told = true
	_ = p.out.message(wirestream.Event, e)
}

// denied tells of a text that was not sent.
func (p *Proxy) denied(text string, refusal *Refusal) {
	if refusal.logged {
		return
	}
	st := p.running(part{sql: strings.TrimSpace(text)}, nil)
	e := p.event(st, posternv1.WireEvent_STATE_ENDED)
	e.Verdict, e.Error = "denied", refusal.detail()
	if p.config.Redact != nil {
		e.Error.Message = p.config.Redact(e.Error.Message)
	}
	e.Duration = durationpb.New(0)
	_ = p.out.message(wirestream.Event, e)
}

// tellIntents has the log note what may write, before it goes to the server.
func (p *Proxy) tellIntents() (*Refusal, error) {
	todo := p.intents
	p.intents = nil
	for _, x := range p.expects {
		for _, st := range x.query {
			if st.write && !st.intended {
				todo = append(todo, st)
			}
		}
	}
	if len(todo) == 0 {
		return nil, nil
	}
	p.mu.Lock()
	p.unanswered, p.ackRefusal = len(todo), nil
	p.mu.Unlock()
	for _, st := range todo {
		st.intended = true
		_ = p.out.message(Intent, p.event(st, posternv1.WireEvent_STATE_RUNNING))
	}
	p.out.flush()
	if p.out.err != nil {
		return nil, errEnded
	}
	return <-p.acks, nil
}
