package report

import (
	"bytes"
	"context"
	"encoding/hex"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	gproto "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxBatch and maxBytes bound a report: its statements, and the size of the message, of
	// which the control plane takes 1 MiB.
	maxBatch = 100
	maxBytes = 900 << 10
	// pageEntries is how many entries of the log are read at once: the log has a bound of its
	// own in bytes, and looks for the first of them from the beginning of its file.
	pageEntries = 20_000
	// gatherTime is how long a statement that has ended waits for others.
	gatherTime = 100 * time.Millisecond
	// tellAnyway is after how many entries without a statement the control plane is told
	// that there was none, so that nobody reads them again.
	tellAnyway = 2000
	// sendTime bounds a report.
	sendTime = time.Minute
	// firstPause and longestPause are between tries that fail.
	firstPause, longestPause = time.Second, time.Minute
)

// KernelRemote begins the remote of log entries of statements that a kernel asked for;
// its id follows.
const KernelRemote = "kernel "

// Actions of the log, as package audit knows them.
const (
	actionRun      = "sql.run"
	actionLost     = "sql.lost"
	actionRegister = "agent.register"
)

// Log is the host's log.
type Log interface {
	// Read returns entries in their order, at most limit and some MiB, from a sequence
	// number on, or from the first that is kept where that was retired, all of them on stable storage.
	Read(from uint64, limit int) ([][]byte, error)
	// Head is the last entry on stable storage.
	Head() auditchain.Head
}

// Config is what a Reporter needs; all fields but Logger are required.
type Config struct {
	Logger *slog.Logger // nil discards
	Log    Log
	// Send brings a report to the control plane. It fails at once while there is no link.
	Send func(context.Context, *posternv1.ReportStatementsRequest) (*posternv1.ReportStatementsResponse, error)
}

// Reporter tells the control plane of kernels' statements.
type Reporter struct {
	cfg     Config
	details *details
	kick    chan struct{}
	ask     atomic.Bool // the control plane may know something else now
	told    atomic.Uint64
	// at is up to where all was told, when known; both are Run's.
	at    auditchain.Head
	known bool
}

// New makes a Reporter; Run makes it work.
func New(cfg Config) *Reporter {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Reporter{cfg: cfg, details: newDetails(), kick: make(chan struct{}, 1)}
}

// Began notes that a statement of a kernel begins; Ended must follow.
func (r *Reporter) Began(id string) { r.details.begin(id) }

// Ended notes how a statement ended, when the log has it: what of it the log has not.
func (r *Reporter) Ended(id string, err *posternv1.ErrorDetail, kept *posternv1.KeptRows) {
	r.details.end(id, err, kept)
	r.look()
}

// Told is the last entry up to which nothing is left to tell; 0 until that is known. Entries
// above it must be kept.
func (r *Reporter) Told() uint64 { return r.told.Load() }

// Wake has the log looked at, from where the control plane says: the link came up.
func (r *Reporter) Wake() {
	r.ask.Store(true)
	r.look()
}

func (r *Reporter) look() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// Run reports until ctx ends.
func (r *Reporter) Run(ctx context.Context) {
	told := "" // the failure that was logged last
	pause := firstPause
	for {
		err := r.catchUp(ctx)
		var again <-chan time.Time
		switch code := proto.CodeOf(err); {
		case ctx.Err() != nil:
			return
		case err == nil:
			told, pause = "", firstPause
		case code == proto.CodeAgentOffline: // no link: it wakes us when there is one
		default:
			if text := err.Error(); text != told {
				told = text
				r.cfg.Logger.Warn("statements of kernels not told to the control plane yet", "err", err)
			}
			again = time.After(pause)
			pause = min(2*pause, longestPause)
		}
		select {
		case <-r.kick:
			select {
			case <-time.After(gatherTime):
			case <-ctx.Done():
				return
			}
		case <-again:
		case <-ctx.Done():
			return
		}
	}
}

// catchUp tells all that has not been told.
func (r *Reporter) catchUp(ctx context.Context) error {
	if r.cfg.Log.Head().Sequence == 0 {
		return nil
	}
	at, from := r.at, r.at.Sequence+1
	if ask := r.ask.Swap(false); ask || !r.known {
		r.known = false
		var err error
		if at, err = r.send(ctx, &posternv1.ReportStatementsRequest{}); err != nil {
			return err
		}
		if from, err = r.begin(at); err != nil {
			return err
		}
		r.at, r.known = at, at.Sequence > 0
		r.told.Store(from - 1)
	}
	for ctx.Err() == nil {
		batch, covered, more, err := r.gather(from)
		if err != nil {
			return err
		}
		if batch == nil {
			r.told.Store(covered)
			return nil
		}
		batch.After = at.Proto()
		now, err := r.send(ctx, batch)
		if err != nil {
			return err
		}
		if through, _ := auditchain.HeadFromProto(batch.Through); now != through {
			if now == at {
				return proto.Errorf(proto.CodeUnavailable, "the control plane did not take them")
			}
			// It was restored, or another tunnel of ours was faster: go on from there.
			at = now
			if from, err = r.begin(now); err != nil {
				return err
			}
			continue
		}
		for _, s := range batch.Statements {
			r.details.forget(s.QueryId)
		}
		at, from = now, now.Sequence+1
		r.at, r.known = now, true
		r.told.Store(now.Sequence)
		if !more {
			return nil
		}
	}
	return context.Cause(ctx)
}

func (r *Reporter) send(ctx context.Context, m *posternv1.ReportStatementsRequest) (auditchain.Head, error) {
	ctx, cancel := context.WithTimeout(ctx, sendTime)
	defer cancel()
	response, err := r.cfg.Send(ctx, m)
	if err != nil {
		return auditchain.Head{}, err
	}
	return auditchain.HeadFromProto(response.Through)
}

// begin is the entry to go on from when all up to at was told. What was told of a log
// that was moved aside since, or before this host registered anew, does not count.
func (r *Reporter) begin(at auditchain.Head) (uint64, error) {
	if at.Sequence > 0 && at.Sequence <= r.cfg.Log.Head().Sequence {
		page, err := r.cfg.Log.Read(at.Sequence, 1)
		if err != nil {
			return 0, err
		}
		if len(page) == 1 {
			e, err := auditchain.Decode(page[0])
			if err == nil && (e.Hash == hex.EncodeToString(at.Hash[:]) || e.Sequence == at.Sequence+1 && e.Prev == hex.EncodeToString(at.Hash[:])) {
				return at.Sequence + 1, nil
			}
		}
	}
	if at.Sequence > 0 {
		r.cfg.Logger.Warn("the control plane knows another log of this host, or one that was retired since: the statements of this one are told from its beginning")
	}
	registered := uint64(0)
	for from := uint64(1); ; {
		page, err := r.cfg.Log.Read(from, pageEntries)
		if err != nil || len(page) == 0 {
			return registered + 1, err
		}
		for _, line := range page {
			if bytes.Contains(line, []byte(`"action":"`+actionRegister+`"`)) {
				if e, err := auditchain.Decode(line); err == nil && e.Action == actionRegister {
					registered = e.Sequence
				}
			}
		}
		if from, err = after(page); err != nil {
			return 0, err
		}
	}
}

// remoteMark is in the line of each entry of a kernel's statement; quotes within texts
// are escaped, so that it is in no other.
var remoteMark = []byte(`"remote":"` + KernelRemote)

// gather makes the next report of what the log has from an entry on; nil if there is
// nothing to tell, up to entry through. more: there may be another one.
func (r *Reporter) gather(from uint64) (batch *posternv1.ReportStatementsRequest, through uint64, more bool, err error) {
	batch = &posternv1.ReportStatementsRequest{}
	var last []byte // the line of the last entry that the report covers
	size, covered := 0, 0
	through = from - 1
	done := func(more bool) (*posternv1.ReportStatementsRequest, uint64, bool, error) {
		if covered == 0 {
			return nil, through, false, nil
		}
		e, err := auditchain.Decode(last)
		if err != nil {
			return nil, through, false, err
		}
		if len(batch.Statements) == 0 && covered < tellAnyway {
			return nil, e.Sequence, false, nil
		}
		head, err := headOf(e)
		batch.Through = head.Proto()
		return batch, e.Sequence, more, err
	}
	for {
		if from > r.cfg.Log.Head().Sequence {
			return done(false)
		}
		page, err := r.cfg.Log.Read(from, pageEntries)
		if err != nil {
			return nil, through, false, err
		}
		if len(page) == 0 {
			return done(false)
		}
		for _, line := range page {
			if bytes.Contains(line, remoteMark) {
				s, wait, err := r.statement(line)
				if err != nil {
					return nil, through, false, err
				}
				if wait {
					return done(false) // its end wakes us
				}
				if s != nil {
					n := gproto.Size(s) + 16
					if n > maxBytes {
						s.Kept = nil
						n = gproto.Size(s) + 16
					}
					if len(batch.Statements) == maxBatch || len(batch.Statements) > 0 && size+n > maxBytes {
						return done(true)
					}
					batch.Statements, size = append(batch.Statements, s), size+n
				}
			}
			last, covered = line, covered+1
		}
		if from, err = after(page); err != nil {
			return nil, through, false, err
		}
	}
}

// statement is what an entry says of a kernel's statement; nil: it is not of its end. wait:
// the rest of it is not there yet.
func (r *Reporter) statement(line []byte) (s *posternv1.KernelStatement, wait bool, err error) {
	e, err := auditchain.Decode(line)
	if err != nil {
		return nil, false, err
	}
	kernel, ok := strings.CutPrefix(e.Remote, KernelRemote)
	if !ok || e.Action != actionRun && e.Action != actionLost {
		return nil, false, nil
	}
	detail, kept, wait := r.details.of(e.QueryID)
	if wait {
		return nil, true, nil
	}
	return statement(e, kernel, detail, kept), false, nil
}

// after is the number of the entry after a page, which may have begun later than asked.
func after(page [][]byte) (uint64, error) {
	e, err := auditchain.Decode(page[len(page)-1])
	return e.Sequence + 1, err
}

func headOf(e auditchain.Entry) (auditchain.Head, error) {
	hash, err := hex.DecodeString(e.Hash)
	if err != nil {
		return auditchain.Head{}, err
	}
	return auditchain.HeadFromProto(&posternv1.AuditHead{Sequence: e.Sequence, Hash: hash})
}

// statement is an entry for the control plane.
func statement(e auditchain.Entry, kernel string, detail *posternv1.ErrorDetail, kept *posternv1.KeptRows) *posternv1.KernelStatement {
	s := &posternv1.KernelStatement{
		QueryId: e.QueryID, KernelId: kernel, Source: e.Source, Sql: e.Statement, Verdict: e.Verdict, State: e.Outcome,
		Principal: &posternv1.Principal{TokenId: e.Target, TokenName: strings.TrimPrefix(e.Actor, "token "), Role: e.Role},
		Ended:     timestamppb.New(e.Time), Duration: durationpb.New(time.Duration(e.DurationMillis) * time.Millisecond),
		Rows: e.Rows, Bytes: e.Bytes, Error: detail, Kept: kept,
	}
	if s.Error == nil && e.Outcome != "done" {
		// The log has no codes.
		code := proto.CodeInternal
		switch {
		case e.Verdict == "denied" || e.Outcome == "denied":
			code = proto.CodePolicyDenied
		case e.Outcome == "cancelled":
			code = proto.CodeCancelled
		case e.Action == actionLost:
			code = proto.CodeSQLSessionDied
		}
		s.Error = &posternv1.ErrorDetail{Code: code, Message: e.Error}
	}
	return s
}
