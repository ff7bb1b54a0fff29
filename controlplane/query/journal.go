package query

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Bounds of what waits to be written.
const (
	// batchTime is how long an event may wait for others, batchMost how many are
	// written at once.
	batchTime = 50 * time.Millisecond
	batchMost = 500
	// queueBytes bounds the texts that wait, queueMost the events.
	queueBytes = 16 << 20
	queueMost  = 4096
	// retryEvery is how often a write that failed is tried again.
	retryEvery = time.Second
	// hopeless is after how many tries a history that the store refuses for a reason of
	// its own is given up.
	hopeless = 30
	// lastTries is how long Close goes on trying.
	lastTries = 10 * time.Second
	// toldAfter is how long a statement runs before its host tells of it.
	toldAfter = 100 * time.Millisecond
	// maxRunning bounds the statements that one session may have under way.
	maxRunning = 64
	// maxMessage bounds an error's text in bytes.
	maxMessage = 8 << 10
)

// Record is the beginning or the end of a statement in the history.
type Record struct {
	Organization, TokenID string
	Query                 *posternv1.Query
	// Known says that the history has its beginning.
	Known bool
}

// JournalConfig is what a Journal needs; all fields are required but Metrics.
type JournalConfig struct {
	Logger *slog.Logger
	// Record writes into the history, all or nothing.
	Record func(context.Context, []Record) error
	// Append writes audit entries of one organization, in their order, durably.
	Append  func(context.Context, []Entry) error
	Metrics *Metrics
}

// Journal keeps history and audit of the statements that hosts tell of: those of
// PostgreSQL clients, which come by the thousand. It writes them in batches, at most 50 ms
// after they came, and never drops one: while nothing can be written, nothing new
// begins and events block their sessions.
type Journal struct {
	cfg   JournalConfig
	queue chan journalItem
	bytes *semaphore.Weighted
	stop  chan struct{} // closed by Close
	done  chan struct{} // closed when run has ended

	mu      sync.Mutex // guards what follows
	running map[string]*wireStatement
	failing error // why the last batch can't be written; nil when all is well
}

// journalItem is one thing to write: an audit entry, a record, or both.
type journalItem struct {
	entry  *Entry
	record *Record
	size   int64
	// ends is the running statement whose end this is; may be nil.
	ends *wireStatement
}

// NewJournal returns a journal at work. Close ends it.
func NewJournal(cfg JournalConfig) *Journal {
	j := &Journal{
		cfg: cfg, queue: make(chan journalItem, queueMost), bytes: semaphore.NewWeighted(queueBytes),
		stop: make(chan struct{}), done: make(chan struct{}), running: map[string]*wireStatement{},
	}
	go j.run()
	return j
}

// WireSession is a session whose statements are told of.
type WireSession struct {
	ID            string
	Principal     *posternv1.Principal
	Agent, Source string
	Remote        string
	// Application is what the client calls itself.
	Application string
	// Cancel asks the host to end a statement.
	Cancel func(ctx context.Context, statement string, by *posternv1.Principal) error
}

// WireEntries are one session's. They are for one goroutine.
type WireEntries struct {
	journal *Journal
	session WireSession
	began   time.Time
	running map[string]*wireStatement
	count   uint64
	latest  time.Time // when the last statement began
}

// wireStatement is one that runs longer than a moment.
type wireStatement struct {
	session *WireSession
	query   *posternv1.Query
	done    chan struct{} // closed when its end is written
}

// Open notes that a session begins; its audit entry is durable when Open returns.
// The entries must be closed.
func (j *Journal) Open(ctx context.Context, s WireSession) (*WireEntries, error) {
	j.mu.Lock()
	failing := j.failing
	j.mu.Unlock()
	if failing != nil {
		return nil, proto.Errorf(proto.CodeUnavailable, "history and audit cannot be written at present: %w", failing)
	}
	s.Application = clip(s.Application, 256)
	e := &WireEntries{journal: j, session: s, began: time.Now(), running: map[string]*wireStatement{}}
	entry := Entry{Action: "wire.open", Principal: s.Principal, Remote: s.Remote, Target: s.Application, SessionID: s.ID, Query: e.query(""), Verdict: "allowed"}
	if err := j.cfg.Append(ctx, []Entry{entry}); err != nil {
		return nil, err
	}
	return e, nil
}

func (e *WireEntries) query(id string) *posternv1.Query {
	return &posternv1.Query{Id: id, Agent: e.session.Agent, Source: e.session.Source, TokenName: e.session.Principal.TokenName, SessionId: e.session.ID}
}

// Event takes what the host tells of a statement. It blocks while too much waits to be
// written.
func (e *WireEntries) Event(event *posternv1.WireEvent) {
	now := time.Now()
	known := e.running[event.StatementId]
	q := e.query(clip(event.StatementId, 64))
	q.Sql = event.Sql
	switch event.State {
	case posternv1.WireEvent_STATE_RUNNING:
		if known != nil || len(e.running) >= maxRunning || q.Id == "" {
			return
		}
		q.State, q.Started = "running", e.start(now.Add(-toldAfter))
		s := &wireStatement{session: &e.session, query: q, done: make(chan struct{})}
		e.running[q.Id] = s
		e.journal.begin(s)
		e.put(journalItem{record: e.record(q, false)})
		return
	case posternv1.WireEvent_STATE_ENDED:
	default:
		return // a newer host's
	}
	took := max(event.Duration.AsDuration(), 0)
	if known == nil {
		q.Started = e.start(now.Add(-took))
	} else {
		delete(e.running, q.Id)
		q.Started = known.query.Started
		if q.Sql == "" {
			q.Sql = known.query.Sql
		}
	}
	q.Rows, q.Bytes, q.Duration = min(event.Rows, math.MaxInt64), min(event.Bytes, math.MaxInt64), durationpb.New(took)
	if event.Error != nil {
		q.Error = &posternv1.ErrorDetail{Code: event.Error.Code, Message: clip(event.Error.Message, maxMessage), Sql: event.Error.Sql}
	}
	q.State = state(q.Error)
	verdict := "allowed"
	if event.Verdict == "denied" {
		verdict, q.State = "denied", "denied"
	}
	e.ended(q, verdict, known)
}

// start is when a statement began by this control plane's clock; statements keep the
// order in which they are told of.
func (e *WireEntries) start(at time.Time) *timestamppb.Timestamp {
	if !at.After(e.latest) {
		at = e.latest.Add(time.Microsecond)
	}
	e.latest = at
	return timestamppb.New(at)
}

func (e *WireEntries) ended(q *posternv1.Query, verdict string, ends *wireStatement) {
	e.count++
	e.journal.cfg.Metrics.told(q)
	e.put(journalItem{
		entry:  &Entry{Action: "sql.run", Principal: e.session.Principal, Query: q, Verdict: verdict, Remote: e.session.Remote, SessionID: e.session.ID},
		record: e.record(q, ends != nil), ends: ends,
	})
}

func (e *WireEntries) record(q *posternv1.Query, known bool) *Record {
	return &Record{Organization: e.session.Principal.Organization, TokenID: e.session.Principal.TokenId, Query: q, Known: known}
}

func (e *WireEntries) put(it journalItem) {
	it.size = 1 << 10
	if it.record != nil {
		it.size += int64(len(it.record.Query.Sql) + len(it.record.Query.Error.GetMessage()))
	}
	e.journal.put(it)
}

// Close notes how the session ended; nil is by its client's will. Statements that the
// host has not told the end of end with it.
func (e *WireEntries) Close(why error) {
	for _, s := range e.running {
		q := s.query
		end := why
		if end == nil {
			end = proto.Errorf(proto.CodeCancelled, "the client hung up")
		} else if proto.CodeOf(end) == proto.CodeInternal {
			end = proto.Errorf(proto.CodeAgentLost, "the session ended: %s", end.Error())
		}
		ended := e.query(q.Id)
		ended.Sql, ended.Started, ended.Duration = q.Sql, q.Started, durationpb.New(time.Since(q.Started.AsTime()))
		ended.Error = proto.Detail(end)
		ended.State = state(ended.Error)
		e.ended(ended, "allowed", s)
	}
	q := e.query("")
	q.Duration, q.State = durationpb.New(time.Since(e.began)), "done"
	if why != nil {
		q.State, q.Error = "failed", &posternv1.ErrorDetail{Message: clip(why.Error(), maxMessage)}
	}
	e.put(journalItem{entry: &Entry{
		Action: "wire.close", Principal: e.session.Principal, Remote: e.session.Remote, SessionID: e.session.ID, Query: q, Target: fmt.Sprintf("%d statements", e.count),
	}})
}

// clip bounds a text in bytes.
func clip(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "")
}

func (j *Journal) begin(s *wireStatement) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.running[s.query.Id] == nil {
		j.running[s.query.Id] = s
		j.cfg.Metrics.started()
	}
}

// put waits for a place in the queue. After Close it drops what comes, and says so.
func (j *Journal) put(it journalItem) {
	it.size = min(it.size, queueBytes)
	if err := j.bytes.Acquire(context.Background(), it.size); err != nil {
		panic(err) // the context never ends
	}
	ended := func() bool {
		select {
		case <-j.done:
			return true
		default:
			return false
		}
	}
	if !ended() {
		select {
		case j.queue <- it:
		case <-j.done:
		}
	}
	if ended() {
		j.bytes.Release(it.size)
		j.cfg.Logger.Error("history and audit entry lost: this control plane has stopped", "entry", it.String())
	}
}

// String names it for the log.
func (it journalItem) String() string {
	if it.entry != nil {
		return it.entry.Action + " " + it.entry.Query.Id + " of session " + it.entry.SessionID
	}
	return "running " + it.record.Query.Id
}

// run writes batches until Close.
func (j *Journal) run() {
	defer close(j.done)
	for {
		var batch []journalItem
		select {
		case it := <-j.queue:
			batch = append(batch, it)
		case <-j.stop:
			j.rest()
			return
		}
		wait := time.NewTimer(batchTime)
	gather:
		for len(batch) < batchMost {
			select {
			case it := <-j.queue:
				batch = append(batch, it)
			case <-wait.C:
				break gather
			case <-j.stop:
				break gather
			}
		}
		wait.Stop()
		if !j.write(batch) {
			return
		}
	}
}

// rest writes what is left in the queue.
func (j *Journal) rest() {
	for {
		var batch []journalItem
		for len(batch) < batchMost && len(j.queue) > 0 {
			batch = append(batch, <-j.queue)
		}
		if len(batch) == 0 || !j.write(batch) {
			return
		}
	}
}

// write writes a batch, however often it takes; false if Close would not wait any
// longer.
func (j *Journal) write(batch []journalItem) bool {
	w := &writing{journal: j}
	w.gather(batch)
	var giveUp <-chan time.Time
	stop := j.stop
	for try := 0; ; try++ {
		err := w.do()
		j.note(err, try)
		if err == nil {
			break
		}
		if try >= hopeless && len(w.entries) == 0 && proto.CodeOf(err) == proto.CodeInternal {
			j.cfg.Logger.Error("history entries lost: the store does not take them; the audit log has them", "entries", len(w.records), "err", err)
			break
		}
		if stop == nil && giveUp == nil {
			giveUp = time.After(lastTries)
		}
		again := time.NewTimer(retryEvery)
		select {
		case <-again.C:
		case <-stop:
			stop = nil
		case <-giveUp:
			again.Stop()
			j.cfg.Logger.Error("history and audit entries lost: they could not be written before this control plane stopped",
				"entries", len(batch)+len(j.queue), "err", err)
			for _, it := range batch {
				j.bytes.Release(it.size)
			}
			return false
		}
		again.Stop()
	}
	for _, it := range batch {
		j.bytes.Release(it.size)
		if it.ends != nil {
			j.forget(it.ends)
			close(it.ends.done)
		}
	}
	return true
}

func (j *Journal) forget(s *wireStatement) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.running[s.query.Id] == s {
		delete(j.running, s.query.Id)
		j.cfg.Metrics.stopped()
	}
}

// note keeps whether all is well, and logs each change of it.
func (j *Journal) note(err error, try int) {
	j.mu.Lock()
	before := j.failing
	j.failing = err
	j.mu.Unlock()
	switch {
	case err != nil && before == nil:
		j.cfg.Logger.Error("history and audit of PostgreSQL clients cannot be written: their sessions wait", "err", err)
	case err == nil && before != nil:
		j.cfg.Logger.Info("history and audit of PostgreSQL clients are written again", "tries", try+1)
	}
}

// writing is a batch on its way: what has been written is not written again.
type writing struct {
	journal *Journal
	entries [][]Entry // by organization
	records []Record
}

func (w *writing) gather(batch []journalItem) {
	at := map[string]int{}
	for _, it := range batch {
		if it.record != nil {
			w.records = append(w.records, *it.record)
		}
		if it.entry == nil {
			continue
		}
		org := it.entry.Principal.Organization
		i, ok := at[org]
		if !ok {
			i = len(w.entries)
			at[org] = i
			w.entries = append(w.entries, nil)
		}
		w.entries[i] = append(w.entries[i], *it.entry)
	}
}

// do writes the audit entries, then the history, whose absence would be the lesser
// loss.
func (w *writing) do() error {
	ctx, cancel := context.WithTimeout(context.Background(), recordTime)
	defer cancel()
	for len(w.entries) > 0 {
		if err := w.journal.cfg.Append(ctx, w.entries[0]); err != nil {
			return err
		}
		w.entries = w.entries[1:]
	}
	if len(w.records) == 0 {
		return nil
	}
	return w.journal.cfg.Record(ctx, w.records)
}

// Cancel ends a statement of the organization that runs in a session here. It reports
// false if there is none; may decides whether this principal may cancel it.
func (j *Journal) Cancel(ctx context.Context, by *posternv1.Principal, id string, may func(owner *posternv1.Principal) error) (bool, error) {
	j.mu.Lock()
	s := j.running[id]
	j.mu.Unlock()
	if s == nil || s.session.Principal.Organization != by.Organization {
		return false, nil
	}
	if err := may(s.session.Principal); err != nil {
		return true, err
	}
	ctx, cancel := context.WithTimeout(ctx, cancelPatience)
	defer cancel()
	if err := s.session.Cancel(ctx, id, by); err != nil {
		return true, err
	}
	select {
	case <-s.done:
	case <-ctx.Done(): // it was asked; its end comes
	}
	return true, nil
}

// Close writes what waits, tries for 10 s where that fails, and ends the journal. The
// sessions must have been closed.
func (j *Journal) Close() {
	close(j.stop)
	<-j.done
}
