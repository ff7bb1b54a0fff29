package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
)

const (
	// maxGroup is how many entries are written at once at most.
	maxGroup = 256
	// writeTimeout bounds one write, whatever its callers' contexts say.
	writeTimeout = 30 * time.Second
	// attempts bounds how often a group is sealed anew because another control
	// plane was faster.
	attempts = 100
	// maxField bounds an entry's fields other than statement and error, in bytes,
	// so that a line stays within auditchain.MaxLine.
	maxField = 1024
	// verifyPage is how many entries are read at once.
	verifyPage = 500
	// listDefault and listMost bound a listing.
	listDefault, listMost = 50, 1000
)

// Store keeps the chains.
type Store interface {
	// AuditHead returns the zero Head for an empty chain.
	AuditHead(ctx context.Context, organization string) (auditchain.Head, error)
	// AppendAudit writes all or nothing, durably; ALREADY_EXISTS if prev is no
	// longer the head.
	AppendAudit(ctx context.Context, organization string, prev auditchain.Head, lines [][]byte, head auditchain.Head) error
	// AuditAfter returns entries above after in ascending order, and the last
	// one's number; no entries mean the end.
	AuditAfter(ctx context.Context, organization string, after uint64, limit int) ([][]byte, uint64, error)
	AuditNewest(ctx context.Context, organization string, limit int) ([][]byte, error)
	// AuditOrganizations are those that have a chain.
	AuditOrganizations(ctx context.Context) ([]string, error)
	// RetireAudit is AppendAudit that drops the entries up to through with it; NOT_FOUND
	// if there is none, and then nothing is written.
	RetireAudit(ctx context.Context, organization string, through uint64, prev auditchain.Head, lines [][]byte, head auditchain.Head) error
}

// Config is what a Log needs.
type Config struct {
	Store Store
	// DefaultOrganization is the id of the organization that gets the entries
	// without one.
	DefaultOrganization string
	// Needed is the last entry of an organization's chain that may be dropped; optional.
	Needed func(ctx context.Context, organization string) (uint64, error)
	// Logger is optional; nil discards.
	Logger *slog.Logger
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// Log is the audit log.
type Log struct {
	cfg Config

	mu     sync.Mutex
	chains map[string]*chain // by organization; guarded by mu
}

// chain is the writing end of one organization's chain.
type chain struct {
	organization string

	mu      sync.Mutex
	waiting []*item // guarded by mu; as many as there are callers

	// writing is held for one group at a time, and taken before mu.
	writing sync.Mutex
	head    auditchain.Head // guarded by writing
	known   bool            // head is what the store has, as far as we know; guarded by writing
}

// item is one caller's entry. done and err are set under chain.writing.
type item struct {
	entry auditchain.Entry
	done  bool
	err   error
}

// New returns a log.
func New(cfg Config) *Log {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Log{cfg: cfg, chains: map[string]*chain{}}
}

// Append seals an entry and returns when it is on the disk. An entry without an
// organization goes to the default one's chain, one without a time gets the
// present. A caller that gives up does not take its entry back: ctx gives values,
// not an end. STORAGE_FULL and UNAVAILABLE mean that it is not written.
func (l *Log) Append(ctx context.Context, e auditchain.Entry) error {
	return l.AppendAll(ctx, []auditchain.Entry{e})
}

// AppendAll is Append for several entries of one organization, in their order. After
// an error the first of them may be written.
func (l *Log) AppendAll(ctx context.Context, entries []auditchain.Entry) error {
	if len(entries) == 0 {
		return nil
	}
	items, err := l.items(entries)
	if err != nil {
		return err
	}
	c := l.chain(items[0].entry.Organization)
	c.mu.Lock()
	c.waiting = append(c.waiting, items...)
	c.mu.Unlock()

	// Whoever gets the lock first writes for all that wait; the others find their
	// entries done.
	c.writing.Lock()
	defer c.writing.Unlock()
	for last := items[len(items)-1]; !last.done; {
		c.mu.Lock()
		n := min(len(c.waiting), maxGroup)
		group := c.waiting[:n:n]
		c.waiting = c.waiting[n:]
		c.mu.Unlock()
		err := l.write(ctx, c, group, l.cfg.Store.AppendAudit)
		for _, one := range group {
			one.done, one.err = true, err
		}
	}
	for _, it := range items {
		if it.err != nil {
			return it.err
		}
	}
	return nil
}

// Appender writes all or nothing, as Store.AppendAudit does, and something else with it.
// It may be called with no lines.
type Appender func(ctx context.Context, organization string, prev auditchain.Head, lines [][]byte, head auditchain.Head) error

// AppendWith is AppendAll whose entries, at most some hundred, are written together, by
// write: with what write adds, or not at all.
func (l *Log) AppendWith(ctx context.Context, organization string, entries []auditchain.Entry, write Appender) error {
	items, err := l.items(entries)
	if err != nil {
		return err
	}
	c := l.chain(organization)
	if len(items) > 0 && items[0].entry.Organization != organization {
		return fmt.Errorf("append audit entries of %s to the log of %s", items[0].entry.Organization, organization)
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	return l.write(ctx, c, items, write)
}

// items makes entries of one organization ready to be sealed.
func (l *Log) items(entries []auditchain.Entry) ([]*item, error) {
	items := make([]*item, len(entries))
	for i := range entries {
		e := entries[i]
		if e.Organization == "" {
			e.Organization = l.cfg.DefaultOrganization
		}
		if i > 0 && e.Organization != items[0].entry.Organization {
			return nil, fmt.Errorf("append %d audit entries at once: they are of several organizations", len(entries))
		}
		if e.Time.IsZero() {
			e.Time = l.cfg.Now()
		}
		bound(&e)
		items[i] = &item{entry: e}
	}
	return items, nil
}

func bound(e *auditchain.Entry) {
	for _, field := range []*string{
		&e.Organization, &e.Actor, &e.Role, &e.Action, &e.Target, &e.Agent, &e.Source, &e.QueryID, &e.Verdict, &e.Outcome, &e.Remote,
	} {
		if len(*field) > maxField {
			*field = (*field)[:maxField] // Seal mends a character cut in two
		}
	}
}

func (l *Log) chain(organization string) *chain {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.chains[organization]
	if c == nil {
		c = &chain{organization: organization}
		l.chains[organization] = c
	}
	return c
}

// write seals a group after the head and stores it. c.writing is held.
func (l *Log) write(ctx context.Context, c *chain, group []*item, write Appender) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTimeout)
	defer cancel()
	var err error
	for range attempts {
		if !c.known {
			if c.head, err = l.cfg.Store.AuditHead(ctx, c.organization); err != nil {
				return err
			}
		}
		head := c.head
		lines := make([][]byte, len(group))
		for i, it := range group {
			entry := it.entry // sealing changes it, and may have to be done again
			head = entry.Seal(head)
			lines[i] = entry.Encode()
		}
		err = write(ctx, c.organization, c.head, lines, head)
		if err == nil {
			c.head, c.known = head, true
			return nil
		}
		// After any failure the store knows better: a commit whose answer was lost
		// may have been carried out.
		c.known = false
		if proto.CodeOf(err) != proto.CodeAlreadyExists {
			return err
		}
		select {
		case <-time.After(rand.N(5 * time.Millisecond)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return fmt.Errorf("append to the audit log of %s: another control plane was faster %d times: %w", c.organization, attempts, err)
}

// List returns encoded entries: ascending from a sequence number, or the newest
// first if from is 0; 50 if limit is 0, at most 1000, and fewer when they are
// long.
func (l *Log) List(ctx context.Context, organization string, from uint64, limit int) ([][]byte, error) {
	if limit <= 0 {
		limit = listDefault
	}
	limit = min(limit, listMost)
	if from == 0 {
		return l.cfg.Store.AuditNewest(ctx, organization, limit)
	}
	lines, _, err := l.cfg.Store.AuditAfter(ctx, organization, from-1, limit)
	return lines, err
}

// Verify reads an organization's whole chain and returns what of it is there and fits. A
// *auditchain.BrokenError says which is the first entry that does not, and how; any
// other error means that the chain could not be read. What Retire dropped must be stood
// for by an entry that is there.
func (l *Log) Verify(ctx context.Context, organization string) (auditchain.Kept, error) {
	for tries := 1; ; tries++ {
		kept, err := l.verify(ctx, organization)
		if !IsBroken(err) || kept.First == 0 || tries == attempts {
			return kept, err
		}
		// Another control plane may have retired entries between two pages.
		lines, _, rerr := l.cfg.Store.AuditAfter(ctx, organization, 0, 1)
		if rerr != nil {
			return kept, rerr
		}
		if len(lines) > 0 {
			if e, derr := auditchain.Decode(lines[0]); derr == nil && e.Sequence > kept.First {
				continue
			}
		}
		return kept, err
	}
}

func (l *Log) verify(ctx context.Context, organization string) (auditchain.Kept, error) {
	before, err := l.cfg.Store.AuditHead(ctx, organization)
	if err != nil {
		return auditchain.Kept{}, err
	}
	var v auditchain.KeptVerifier
	broken := func(sequence uint64, reason string) (auditchain.Kept, error) {
		return v.Kept(), &auditchain.BrokenError{Sequence: sequence, Reason: reason}
	}
	ours := ownerMark(organization)
	for after := uint64(0); ; {
		lines, last, err := l.cfg.Store.AuditAfter(ctx, organization, after, verifyPage)
		if err != nil {
			return v.Kept(), err
		}
		if len(lines) == 0 {
			break
		}
		for _, line := range lines {
			if !ownedBy(line, ours) {
				return broken(v.Head().Sequence+1, "it was altered: it is not an entry of this organization")
			}
			if err := v.Add(line); err != nil {
				return v.Kept(), err
			}
			if v.Head().Sequence == before.Sequence && v.Head() != before {
				return broken(before.Sequence, "it was altered: it is not the entry that the log's head names")
			}
		}
		if last != v.Head().Sequence {
			return broken(v.Head().Sequence+1, fmt.Sprintf("reordered: it is stored as entry %d", last))
		}
		after = last
	}
	if v.Head().Sequence < before.Sequence {
		return broken(v.Head().Sequence+1, fmt.Sprintf("removed: the log had reached entry %d", before.Sequence))
	}
	if err := v.End(); err != nil {
		return v.Kept(), err
	}
	// Others may have appended meanwhile, but then the head has moved too.
	now, err := l.cfg.Store.AuditHead(ctx, organization)
	if err != nil {
		return v.Kept(), err
	}
	if v.Head().Sequence > now.Sequence {
		return broken(now.Sequence+1, "it was added behind the log's head")
	}
	return v.Kept(), nil
}

// ownerMark is how an entry's line says whose it is. Quotes within other fields
// are escaped, so it stands nowhere else.
func ownerMark(organization string) []byte {
	name, err := json.Marshal(organization)
	if err != nil {
		panic(err) // a string always encodes
	}
	return append([]byte(`"organization":`), name...)
}

func ownedBy(line, mark []byte) bool { return bytes.Contains(line, mark) }

// IsBroken reports whether Verify found the chain broken, as against unreadable.
func IsBroken(err error) bool {
	var broken *auditchain.BrokenError
	return errors.As(err, &broken)
}
