package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/postern-dev/postern/proto/auditchain"
)

const (
	// segmentAge is when the next segment begins, at its first entry, where there is a
	// Retention: so that what is old is not kept by what is new in the same file.
	segmentAge = 24 * time.Hour
	// retireEvery is how often it is looked whether there is something to drop, and
	// retireFirst when that is after the start, when the control plane has said what it knows.
	retireEvery = time.Hour
	retireFirst = time.Minute
)

var retireMark = []byte(`"action":"` + auditchain.RetireAction + `"`)

// Retention says what may be dropped; the zero value is nothing.
type Retention struct {
	// Age is how old an entry has to be to be dropped; 0: age is no reason.
	Age time.Duration
	// Bytes is above which size of the log its oldest entries are dropped; 0: size is no reason.
	Bytes int64
}

// SetRetention sets what RunRetention drops from now on.
func (l *Log) SetRetention(r Retention) { l.retention.Store(&r) }

func (l *Log) keeps() Retention {
	if r := l.retention.Load(); r != nil {
		return *r
	}
	return Retention{}
}

// Retire drops the oldest segments that r lets go, and returns how many entries they had.
// None is dropped that has an entry above limit, and never the newest. The entries are
// verified before, so that nothing that was done to them is covered up (a *TamperedError:
// nothing more is dropped); then an entry is written that stands for them
// (auditchain.RetireAction, with the number and hash of the last of them), and only then they are
// removed. One that is killed in between leaves segments that the next one drops.
func (l *Log) Retire(ctx context.Context, r Retention, limit uint64) (uint64, error) {
	l.retiring.Lock()
	defer l.retiring.Unlock()
	if r == (Retention{}) {
		return 0, nil
	}
	files, err := segments(l.dir)
	if err != nil {
		return 0, err
	}
	drop, through, entries, err := l.old(files, r, limit)
	if err != nil || len(drop) == 0 {
		return 0, err
	}
	if err := l.Append(ctx, auditchain.Entry{
		Actor: "host", Action: auditchain.RetireAction, Target: auditchain.RetireTarget(through), Outcome: "done", Rows: entries,
	}); err != nil {
		return 0, err
	}
	return l.drop(drop)
}

// A segmentEnd is a segment that was verified.
type segmentEnd struct {
	file    string
	bytes   int64
	entries uint64
	head    auditchain.Head
}

// old finds the segments to drop and verifies them, and that what follows them does.
func (l *Log) old(files []string, r Retention, limit uint64) (drop []segmentEnd, through auditchain.Head, entries uint64, err error) {
	_, size := l.Stats()
	v := auditchain.NewVerifier(l.base)
	through = l.base
	for i := range len(files) - 1 {
		st, err := os.Stat(files[i])
		if err != nil {
			return nil, through, 0, fmt.Errorf("audit log: %w", err)
		}
		var last []byte
		one := segmentEnd{file: files[i], bytes: st.Size()}
		torn, err := scan(files[i], func(line []byte, _ int64) error {
			last = append(last[:0], line...)
			one.entries++
			return v.Add(line)
		})
		if err == nil && len(torn) > 0 {
			err = errors.New("it ends within a line, and it is not the newest")
		}
		if err != nil {
			return nil, through, 0, tampered(files[i], err)
		}
		one.head = v.Head()
		if last != nil {
			e, err := auditchain.Decode(last)
			if err != nil {
				return nil, through, 0, &TamperedError{files[i], err}
			}
			aged := r.Age > 0 && e.Time.Before(l.cfg.Now().Add(-r.Age))
			if e.Sequence > limit || !aged && (r.Bytes == 0 || size <= r.Bytes) {
				break
			}
		}
		drop, through, size, entries = append(drop, one), one.head, size-one.bytes, entries+one.entries
	}
	if entries == 0 {
		return nil, through, 0, nil
	}
	next := files[len(drop)]
	first, err := firstEntry(next)
	if err != nil {
		return nil, through, 0, tampered(next, err)
	}
	if before, err := auditchain.Before(first); err != nil || before != through {
		return nil, through, 0, &TamperedError{next, &auditchain.BrokenError{Sequence: first.Sequence, Reason: "it does not follow the entries before it, which were to be retired"}}
	}
	return drop, through, entries, nil
}

// drop removes segments that an entry stands for, oldest first.
func (l *Log) drop(segments []segmentEnd) (dropped uint64, err error) {
	for _, one := range segments {
		if err := l.fault("remove"); err != nil {
			return dropped, fmt.Errorf("audit log: %w", err)
		}
		if err := os.Remove(one.file); err != nil {
			return dropped, fmt.Errorf("audit log: %w", err)
		}
		l.base = one.head
		dropped += one.entries
		l.mu.Lock()
		l.bytes -= one.bytes
		l.retired += one.entries
		l.first = one.head.Sequence + 1
		l.mu.Unlock()
	}
	d, err := os.Open(l.dir)
	if err == nil {
		err = errors.Join(d.Sync(), d.Close())
	}
	if err != nil {
		return dropped, fmt.Errorf("audit log: %w", err)
	}
	return dropped, nil
}

// RunRetention drops what SetRetention lets go, a minute from now and every hour, until
// ctx ends; limit says up to which entry that is. What fails is said in the log and tried again.
func (l *Log) RunRetention(ctx context.Context, limit func() uint64) {
	timer := time.NewTimer(retireFirst)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		timer.Reset(retireEvery)
		r := l.keeps()
		n, err := l.Retire(ctx, r, limit())
		if err != nil && ctx.Err() == nil {
			l.logger.Error("audit log not retired", "err", err)
		}
		if n > 0 {
			l.logger.Info("audit entries retired", "entries", n)
		}
		if _, size := l.Stats(); r.Bytes > 0 && size > r.Bytes+l.cfg.SegmentBytes && ctx.Err() == nil {
			l.logger.Warn("the audit log is larger than audit.max_size: what the control plane or the syslog server has not got yet is kept", "bytes", size)
		}
	}
}

// Retired says how many entries this process dropped, and the number of the first that is
// kept (1 if none was ever dropped).
func (l *Log) Retired() (dropped, first uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.retired, max(l.first, 1)
}

// baseOf is the head before the first entry that is kept; zero if that is entry 1. Where
// segments are missing at the beginning, an entry has to stand for them.
func baseOf(files []string) (auditchain.Head, error) {
	if len(files) == 0 || numberOf(files[0]) == 1 {
		return auditchain.Head{}, nil
	}
	gone := &TamperedError{files[0], fmt.Errorf("the segments before %d are missing, and no entry retires them", numberOf(files[0]))}
	first, err := firstEntry(files[0])
	if err != nil {
		return auditchain.Head{}, tampered(files[0], err)
	}
	if first.Sequence <= 1 {
		return auditchain.Head{}, gone
	}
	base, err := auditchain.Before(first)
	if err != nil {
		return base, &TamperedError{files[0], err}
	}
	// The newest one stands for most.
	for _, file := range slices.Backward(files) {
		var stands auditchain.Head
		_, err := scan(file, func(line []byte, _ int64) error {
			if !bytes.Contains(line, retireMark) {
				return nil
			}
			e, err := auditchain.Decode(line)
			if err != nil {
				return err
			}
			if h, ok := auditchain.RetiredHead(e); ok {
				stands = h
			}
			return nil
		})
		switch {
		case err != nil:
			return base, tampered(file, err)
		case stands.Sequence > base.Sequence, stands == base:
			return base, nil
		case stands.Sequence > 0:
			return base, gone
		}
	}
	return base, gone
}

// numberOf is the number in a segment's name.
func numberOf(file string) int {
	n, _ := strconv.Atoi(strings.TrimSuffix(filepath.Base(file), ".jsonl")) //nolint:errcheck // segments took it
	return n
}

// firstEntry is a segment's first; the zero Entry if it has none.
func firstEntry(file string) (auditchain.Entry, error) {
	var first auditchain.Entry
	_, err := scan(file, func(line []byte, _ int64) error {
		e, err := auditchain.Decode(line)
		if err != nil {
			return err
		}
		first = e
		return errStop
	})
	if errors.Is(err, errStop) {
		err = nil
	}
	return first, err
}

// again runs f anew while segments vanish under it, because they are retired meanwhile.
func again(f func() error) error {
	var err error
	for range 10 {
		if err = f(); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return err
}
