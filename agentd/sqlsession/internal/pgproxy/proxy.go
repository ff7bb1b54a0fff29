package pgproxy

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/wirestream"
)

// Config is what a Proxy needs. All of it but Redact is required.
type Config struct {
	// SessionID begins the ids of statements.
	SessionID string
	// Server is the connection to the database: authenticated, idle, with nothing
	// unread. Its settings are those of Startup. The caller closes it.
	Server net.Conn
	// Parameters are the ParameterStatus values that it has told so far.
	Parameters map[string]string
	// Version is its major version.
	Version int
	// Cancel sends the server a cancel request for Server, and returns when it has
	// been passed on.
	Cancel func(context.Context) error
	// Agentd takes frames: Opened, Data, Event, Intent, Credit, End. Write deadlines
	// must unblock a write.
	Agentd net.Conn
	// Parser and Judge say what may be sent. Guard is the policy, ReadWrite its mode.
	Parser pgtree.Parser
	Judge  Judge
	Guard  frame.Guard
	// Hide is for statements whose Verdict has no Hider of their own; nil: the source
	// masks nothing.
	Hide      Hider
	ReadWrite bool
	// Spare, which may be nil, makes of a statement one that tells less, or "": judged is
	// parsed and held against the policy, and sent goes to the server.
	Spare func(text string, tree *pgtree.Tree) (judged, sent string)
	// Planner answers EXPLAIN; nil: plans are off.
	Planner Planner
	// Discreet, which may be nil, is what is told in place of the server's ErrorResponse.
	Discreet func(body []byte) *Refusal
	// MaxRows, MaxBytes (of protocol) and Timeout bound each statement.
	MaxRows, MaxBytes uint64
	Timeout           time.Duration
	// Idle and IdleInTransaction bound the wait for the client's next message.
	Idle, IdleInTransaction time.Duration
	// Redact makes a text fit for logs; nil leaves it.
	Redact func(string) string
}

const (
	// buffer is how much of the server's words is looked at at once, in bytes.
	buffer = 256 << 10
	// firstBuffer is that until a result is long.
	firstBuffer = 16 << 10
	// maxBatch is how many bytes are sent to a server that may be waiting for us to
	// read: what the sockets take on any system.
	maxBatch = 16 << 10
	// moment is how long a statement runs before it is told of.
	moment = 100 * time.Millisecond
	// watchAfter is how long a session is idle before it looks at the server.
	watchAfter = 20 * time.Millisecond
	// killAfter is how long a stopped statement may take to end.
	killAfter = 10 * time.Second
	// maxBody bounds the messages that are held whole, in bytes: texts and names.
	maxBody = MaxText + 64<<10
	// maxBind bounds a Bind, which passes through in pieces, in bytes.
	maxBind = 64 << 20
	// maxStatements bounds the prepared statements of a session, and maxStatementText
	// all their texts in bytes.
	maxStatements    = 10_000
	maxStatementText = 16 << 20
)

// Reasons to stop a statement that are the proxy's own.
const (
	rowLimit  frame.Reason = 'r'
	byteLimit frame.Reason = 'b'
)

// poison is sent in the place of what is refused: no SQL, so that the server fails
// it without doing anything. It stands in the server's log.
const poison = "refused by postern: not sent"

// ours is the name of what we prepare; poisoned is one that never comes to be.
const (
	ours     = "postern"
	poisoned = "postern refused"
)

// Proxy is one session. Make it with New, run it with Run.
type Proxy struct {
	config Config
	in     *input
	out    *output
	drain  chan struct{} // closed by Drain
	once   sync.Once

	// The following belongs to Run's goroutine.
	server
	body  []byte // of the client's message at hand
	taken int    // of the client's bytes, since the last Credit
	batch []byte // for the server, not sent yet
	// expects is what the server owes an answer to, in order; the last unsent of them
	// are in batch.
	expects []*expect
	// open: the server has messages of the extended protocol that no Sync followed.
	open bool
	// sent: the server was sent something of the cycle that is open.
	sent bool
	// skipping: an error came, and what the client sends counts from its Sync on.
	skipping bool
	// serverSkips: so does the server for a question of ours; see Ask.
	serverSkips bool
	// swallow: what the server says until ReadyForQuery is not for the client, who has
	// been told of an error that the server does not know of; mustFail: its
	// transaction has to fail for that.
	swallow, mustFail bool
	tx                byte // of the last ReadyForQuery: I, T or E
	current           *running
	seq               uint64
	statements        map[string]*preparedStatement // that the server has
	statementText     int                           // bytes of all of them
	staged            map[string]*preparedStatement // on their way; nil values: closed
	portals           map[string]*portal
	stagedPortals     map[string]*portal
	cursors           map[string]*tally
	declaring         map[string]*tally // in the cycle under way
	intents           []*running        // to be told of before batch goes
	verdicts          cache
	keyBuffer         []byte
	hidden            []byte // a masked row
	epoch             uint64 // counts what may change the meaning of names
	pathNamesCatalog  bool
	pathKnown         bool // pathNamesCatalog is right
	ownPath           bool
	copying           bool          // the client's data go to a COPY, and its wait is watched
	mustDrain         bool          // batch holds what may change the meaning of names
	acks              chan *Refusal // the answer to all intents of a batch
	fatal             *posternv1.WireEnd
	broken            error // the connection's, found out while a question was asked

	// Shared with the other methods.
	startedAt atomic.Int64  // of the statement under way, Unix nanoseconds; 0: none
	shownSeq  atomic.Uint64 // its number
	announced atomic.Bool
	// budget is how long it may run, in nanoseconds. The server tells of the statements
	// of one cycle when it likes, so what stands between us and a client that has set the
	// server's own limit aside is the limit times the number of them.
	budget  atomic.Int64
	ticking atomic.Bool
	stopped atomic.Bool
	ticker  *time.Timer
	mu      sync.Mutex
	ended   bool // Run is over
	// unanswered is how many intents wait for their Ack, ackRefusal the first refusal
	// of those before.
	unanswered int
	ackRefusal *Refusal
	busy       bool          // the server has a cycle
	reason     frame.Reason  // why it was stopped; 0: it was not
	over       chan struct{} // closed when a stopped cycle is over
	stopping   sync.WaitGroup
}

// expect is a message that the server has to answer.
type expect struct {
	kind byte // Q P B D C E S, as sent
	// swap: the message is poison for something refused.
	swap *Refusal
	// runs is what an Execute runs; of a Query there is a list.
	runs  *running
	query []*running
	next  int // of query
	// hide is for a Describe's answer; with portal it is ours, and not for the client.
	hide   Hider
	portal *portal
	// done is called when it succeeded.
	done func()
	// quiet: the answer is not for the client.
	quiet bool
}

// preparedStatement is a text that was prepared, by a Parse or by PREPARE.
type preparedStatement struct {
	// types are the types of parameters that its Parse gave, with their count; nil:
	// PREPARE made it.
	types []byte
	// bound: a plan that it shows was shown.
	bound bool
	text  string
	part  part
	j     *judgement
}

// portal is what an Execute names; its tally goes over all of its Executes.
type portal struct {
	statement *preparedStatement
	tally     *tally
	shape     shape
}

// tally counts what the client got of one result.
type tally struct{ rows, bytes uint64 }

// running is one statement under way.
type running struct {
	part
	seq      uint64
	started  time.Time
	tally    *tally
	before   tally // of tally when it began
	told     bool  // a RUNNING event went out
	intended bool
	dropped  bool // rows were left out
	declared *tally
	// portal is what an Execute names; without one the rows have the shape.
	portal *portal
	shape  shape
}

// New makes a Proxy for a session that Run is to serve.
func New(config Config) *Proxy {
	p := &Proxy{
		config: config, in: newInput(), out: newOutput(config.Agentd), drain: make(chan struct{}), tx: 'I',
		statements: map[string]*preparedStatement{}, staged: map[string]*preparedStatement{}, portals: map[string]*portal{}, stagedPortals: map[string]*portal{}, cursors: map[string]*tally{},
		acks: make(chan *Refusal, 1),
	}
	p.server = server{conn: config.Server, b: make([]byte, firstBuffer), e: wirestream.HeaderSize, r: wirestream.HeaderSize, w: wirestream.HeaderSize, raw: bulkConn(config.Server)}
	p.ticker = time.AfterFunc(time.Hour, p.tick)
	p.ticker.Stop()
	return p
}

// Feed takes a piece of what the client sent, copies it and does not wait. It fails
// when more than Window is on its way.
func (p *Proxy) Feed(data []byte) error { return p.in.feed(data) }

// Hangup says that nothing more comes from the client: what runs is cancelled.
func (p *Proxy) Hangup() {
	p.in.close()
	p.Stop(frame.Cancelled, 0)
}

// Drain ends the session as soon as the server has no cycle under way.
func (p *Proxy) Drain() { p.once.Do(func() { close(p.drain) }) }

// Ack answers one Intent: nil lets the statement go to the server. A batch goes when
// all of its intents were answered, and not at all when one of them was refused. It
// does not wait.
func (p *Proxy) Ack(refusal *Refusal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.unanswered == 0 {
		return // nobody asked
	}
	if p.unanswered--; p.ackRefusal == nil {
		p.ackRefusal = refusal
	}
	if p.unanswered == 0 {
		p.acks <- p.ackRefusal // there is room: tellIntents takes it before it asks again
	}
}

// Stop cancels the statement with this number (0: whichever runs) in the database;
// it does not wait. Only the first reason counts.
func (p *Proxy) Stop(reason frame.Reason, seq uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended || !p.busy || p.reason != 0 || seq != 0 && seq != p.shownSeq.Load() {
		return
	}
	p.reason = reason
	p.over = make(chan struct{})
	p.stopped.Store(true)
	p.stopping.Add(1)
	go p.cancel(p.over)
	p.out.interrupt()
}

// cancel sends cancel requests until the cycle is over: one that meets the server
// between two messages is not heeded.
func (p *Proxy) cancel(over <-chan struct{}) {
	defer p.stopping.Done()
	began := time.Now()
	for pause := moment; ; pause = min(2*pause, 3*time.Second) {
		ctx, done := context.WithTimeout(context.Background(), 3*time.Second)
		_ = p.config.Cancel(ctx) // it is sent again
		done()
		select {
		case <-over:
			return
		case <-time.After(pause):
		}
		if time.Since(began) > killAfter {
			_ = p.config.Server.SetDeadline(time.Now().Add(-time.Second))
			p.mu.Lock()
			p.ended = true // the deadline is not to be lifted
			p.mu.Unlock()
			return
		}
	}
}

// begin marks that the server has a cycle.
func (p *Proxy) begin() {
	p.mu.Lock()
	p.busy = true
	p.mu.Unlock()
	if p.ticking.CompareAndSwap(false, true) {
		p.ticker.Reset(p.tickEvery())
	}
}

// end marks that it has none. When it returns no cancel request is under way.
func (p *Proxy) end() {
	p.mu.Lock()
	p.busy = false
	over := p.over
	p.over, p.reason = nil, 0
	p.mu.Unlock()
	p.startedAt.Store(0)
	if over != nil {
		close(over)
		p.stopping.Wait()
		p.stopped.Store(false)
		p.out.resume()
	}
}

func (p *Proxy) tickEvery() time.Duration {
	return max(time.Millisecond, min(p.config.Timeout/4, moment))
}

// tick looks at the statement under way, from the timer's goroutine.
func (p *Proxy) tick() {
	p.mu.Lock()
	busy := p.busy && !p.ended
	p.mu.Unlock()
	if !busy {
		p.ticking.Store(false)
		return
	}
	if at := p.startedAt.Load(); at != 0 {
		ran := time.Since(time.Unix(0, at))
		if ran >= time.Duration(p.budget.Load()) {
			p.Stop(frame.TimedOut, p.shownSeq.Load())
		}
		if ran >= moment && !p.announced.Load() {
			p.mu.Lock()
			if p.busy && !p.ended {
				_ = p.config.Server.SetReadDeadline(time.Now().Add(-time.Second))
			}
			p.mu.Unlock()
		}
	}
	p.ticker.Reset(p.tickEvery())
}

// errEnded ends Run without an error of the session's: the client went.
var errEnded = errors.New("the client ended the session")

// fail is how a session ends that the client is told of.
type fail struct{ *Refusal }

// Run serves the session until it ends and sends the End frame. It returns an
// error only when agentd's end is gone.
func (p *Proxy) Run() error {
	opened := &posternv1.WireOpened{}
	for _, name := range reported {
		if value, ok := p.config.Parameters[name]; ok {
			opened.Parameters = append(opened.Parameters, &posternv1.WireSetting{Name: name, Value: value})
		}
	}
	if err := p.out.message(wirestream.Opened, opened); err != nil {
		return err
	}
	err := p.serve()
	p.end()
	p.mu.Lock()
	p.ended = true
	p.mu.Unlock()
	p.ticker.Stop()
	p.lose(err)
	p.out.endData()
	if err := p.out.message(wirestream.End, p.farewell(err)); err != nil {
		return err
	}
	p.out.flush()
	return p.out.err
}

// reported are the parameters that clients are told of at the start.
var reported = []string{
	"server_version", "server_encoding", "client_encoding", "application_name", "is_superuser", "session_authorization", "DateStyle", "IntervalStyle",
	"TimeZone", "integer_datetimes", "standard_conforming_strings", "default_transaction_read_only", "in_hot_standby", "scram_iterations", "search_path",
}

// farewell tells the client why the session ends, and makes the last frame.
func (p *Proxy) farewell(err error) *posternv1.WireEnd {
	if p.fatal != nil { // the server's own last word
		return p.fatal
	}
	var reason fail
	var refusal *Refusal
	switch {
	case errors.Is(err, errEnded):
		return &posternv1.WireEnd{}
	case errors.As(err, &reason):
		refusal = reason.Refusal
	default:
		refusal = &Refusal{SQLState: stateConnectionLost, Message: "the connection to the database was lost", Code: proto.CodeSourceUnreachable}
		if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			var op *net.OpError
			if !errors.As(err, &op) {
				refusal.Message += ": " + oneLine(err)
			}
		}
	}
	p.out.add(appendError(nil, "FATAL", refusal))
	return &posternv1.WireEnd{Error: refusal.detail(), Sqlstate: refusal.SQLState, Told: true}
}

// lose tells the log of what ran when the session ended.
func (p *Proxy) lose(err error) {
	st := p.current
	if st == nil {
		return
	}
	detail := &posternv1.ErrorDetail{Code: proto.CodeCancelled, Message: "the client went away while the statement ran: it was cancelled in the database"}
	var reason fail
	switch {
	case errors.As(err, &reason):
		detail = reason.detail()
	case !errors.Is(err, errEnded):
		detail = &posternv1.ErrorDetail{Code: proto.CodeSourceUnreachable, Message: "the connection to the database was lost while the statement ran"}
	}
	p.finish(st, "", detail)
}

// learnPath finds out whether unqualified names are pg_catalog's first.
func (p *Proxy) learnPath() {
	if p.pathKnown {
		return
	}
	ctx, done := context.WithTimeout(context.Background(), judgeTimeout)
	defer done()
	rows, err := p.Ask(ctx, "SHOW search_path")
	p.pathKnown = err == nil
	p.pathNamesCatalog = err != nil || len(rows) != 1 || strings.Contains(strings.ToLower(rows[0][0]), "pg_catalog")
}

var _ Asker = (*Proxy)(nil)

// bulkConn is how a long result is read: TCP without TLS has a low-water mark.
func bulkConn(conn net.Conn) syscall.RawConn {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}
