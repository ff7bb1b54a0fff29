package audit_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/controlplane/audit"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto/auditchain"
)

// epoch is the time of the first of the entries that aged writes.
var epoch = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)

// aged writes n entries, one a day from epoch on.
func aged(t *testing.T, l *audit.Log, organization string, n int) {
	t.Helper()
	entries := make([]auditchain.Entry, n)
	for i := range entries {
		entries[i] = auditchain.Entry{Time: epoch.AddDate(0, 0, i), Organization: organization, Action: "test", Statement: fmt.Sprint("select ", i)}
	}
	if err := l.AppendAll(ctx, entries); err != nil {
		t.Fatal(err)
	}
}

func day(n int) time.Time { return epoch.AddDate(0, 0, n) }

func TestRetire(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		l := audit.New(audit.Config{Store: s, DefaultOrganization: store.DefaultOrganizationID, Now: func() time.Time { return day(1300) }})
		aged(t, l, org, 1200)
		aged(t, l, "org_other", 3)
		for _, step := range []struct {
			before      time.Time
			want, first uint64
			last        uint64
		}{
			{day(0), 0, 1, 1200}, // nothing is that old
			{day(1), 1, 2, 1201},
			{day(1), 0, 2, 1201},
			{day(700), 699, 701, 1202},
			{day(1200), 500, 1201, 1203}, // all but those that stand for others
		} {
			n, err := l.Retire(ctx, org, step.before)
			if err != nil || n != step.want {
				t.Fatalf("retire before %s: %d, %v, want %d", step.before, n, err, step.want)
			}
			kept, err := l.Verify(ctx, org)
			if err != nil || kept.First != step.first || kept.Last != step.last || kept.Entries() != step.last-step.first+1 || (kept.String() != "") != (step.first > 1) {
				t.Fatalf("retired before %s: %+v, %v", step.before, kept, err)
			}
			lines, err := newLog(s).List(ctx, org, 1, 1) // from the beginning: from what is kept
			if err != nil || len(lines) != 1 {
				t.Fatalf("list: %q, %v", lines, err)
			}
			if e, err := auditchain.Decode(lines[0]); err != nil || e.Sequence != step.first {
				t.Errorf("the first is %d, %v, want %d", e.Sequence, err, step.first)
			}
		}
		// The chain goes on, here and at another control plane.
		write(t, l, 2)
		write(t, newLog(s), 2)
		if kept, err := l.Verify(ctx, org); err != nil || kept.Last != 1207 {
			t.Errorf("got %+v, %v", kept, err)
		}
		verified(t, l, "org_other", 3)
		// Even a clock that jumped leaves the entry that stands for all others.
		if n, err := l.Retire(ctx, org, day(99999)); err != nil || n != 7 {
			t.Errorf("retired %d, %v", n, err)
		}
		if kept, err := l.Verify(ctx, org); err != nil || kept.First != 1208 || kept.Last != 1208 {
			t.Errorf("got %+v, %v", kept, err)
		}
	})
}

// Several control planes retire one chain and write it, and verify it meanwhile.
func TestRetireAtOnce(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		aged(t, newLog(s), org, 6000)
		var group sync.WaitGroup
		var dropped [2]uint64
		for i := range dropped {
			group.Go(func() {
				n, err := newLog(s).Retire(ctx, org, day(5500))
				if err != nil {
					t.Error(err)
				}
				dropped[i] = n
			})
		}
		group.Go(func() {
			for range 5 {
				if _, err := newLog(s).Verify(ctx, org); err != nil {
					t.Error(err)
				}
			}
		})
		group.Go(func() { write(t, newLog(s), 20) })
		group.Wait()
		kept, err := newLog(s).Verify(ctx, org)
		if err != nil || kept.First != 5501 || kept.Last < 6022 {
			t.Errorf("got %+v, %v", kept, err)
		}
		if dropped[0]+dropped[1] < 5500 {
			t.Errorf("dropped %v", dropped)
		}
	})
}

// What is kept is as hard to tamper with as a whole chain, and what was tampered with is
// not covered up by dropping it.
func TestTamperedRetired(t *testing.T) {
	for _, test := range []struct {
		name, statement string
		want            uint64
		reason          string
	}{
		{"one more dropped", "DELETE FROM audit WHERE sequence = 5", 5, "begins with entry 6"},
		{"removed", "DELETE FROM audit WHERE sequence = 7", 7, "removed"},
		{"the entry that stands for them removed", "DELETE FROM audit WHERE sequence = 11; UPDATE audit_heads SET sequence = 10, hash = hash", 10, "head names"},
		{"end removed", "DELETE FROM audit WHERE sequence = 11", 11, "removed"},
		{"altered", "UPDATE audit SET line = CAST(replace(CAST(line AS text), 'select 5', 'select 4') AS blob) WHERE sequence = 6", 6, "altered"},
		{"all removed", "DELETE FROM audit", 1, "removed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, db := openSQLite(t)
			l := newLog(s)
			aged(t, l, org, 10)
			if n, err := l.Retire(ctx, org, day(4)); err != nil || n != 4 {
				t.Fatal(n, err)
			}
			for one := range strings.SplitSeq(test.statement, "; ") {
				if _, err := db.ExecContext(ctx, one); err != nil {
					t.Fatal(err)
				}
			}
			var broken *auditchain.BrokenError
			if _, err := l.Verify(ctx, org); !errors.As(err, &broken) || broken.Sequence != test.want || !strings.Contains(broken.Reason, test.reason) {
				t.Errorf("got %v, want entry %d and %q", err, test.want, test.reason)
			}
			if n, err := newLog(s).Retire(ctx, org, day(8)); n != 0 || (test.name != "all removed" && !audit.IsBroken(err)) {
				t.Errorf("retired %d, %v", n, err)
			}
		})
	}
}

// RunRetention goes over all chains, and a broken one stands in no other's way.
func TestRunRetention(t *testing.T) {
	s, db := openSQLite(t)
	aged(t, newLog(s), "org_a", 10)
	aged(t, newLog(s), "org_b", 10)
	if _, err := db.ExecContext(ctx, "DELETE FROM audit WHERE sequence = 3 AND organization = 'org_a'"); err != nil {
		t.Fatal(err)
	}
	var text lockedBuffer
	l := audit.New(audit.Config{Store: s, DefaultOrganization: "org_a", Now: func() time.Time { return day(405) }, Logger: slog.New(slog.NewTextHandler(&text, nil))})
	within, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var group sync.WaitGroup
	group.Go(func() { l.RunRetention(within, 400*24*time.Hour) })
	for !strings.Contains(text.String(), "audit entries retired") && within.Err() == nil {
		time.Sleep(5 * time.Millisecond)
	}
	cancel()
	group.Wait()
	if kept, err := l.Verify(ctx, "org_b"); err != nil || kept.First != 6 || kept.Last != 11 {
		t.Errorf("got %+v, %v", kept, err)
	}
	if lines, err := l.List(ctx, "org_a", 1, 100); err != nil || len(lines) != 9 {
		t.Errorf("%d lines are left of the broken one, %v", len(lines), err)
	}
	if got := text.String(); !strings.Contains(got, "audit log not retired") || !strings.Contains(got, "entry 3") {
		t.Error(got)
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestRetireNeeded: what is needed elsewhere stays, however old.
func TestRetireNeeded(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		const to = "tcp://logs:514"
		l := audit.New(audit.Config{Store: s, DefaultOrganization: store.DefaultOrganizationID, Now: func() time.Time { return day(100) }, Needed: func(ctx context.Context, organization string) (uint64, error) {
			h, err := s.AuditForwarded(ctx, to, organization)
			return h.Sequence, err
		}})
		aged(t, l, org, 10)
		waiting := func(want ...string) {
			t.Helper()
			if got, err := s.AuditWaiting(ctx, to); err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("waiting: %v, %v, want %v", got, err, want)
			}
		}
		forwarded := func(n uint64) {
			t.Helper()
			lines, _, err := s.AuditAfter(ctx, org, n-1, 1)
			if err != nil {
				t.Fatal(err)
			}
			e, err := auditchain.Decode(lines[0])
			if err != nil {
				t.Fatal(err)
			}
			h, err := auditchain.HeadOf(e)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.SetAuditForwarded(ctx, to, org, h); err != nil {
				t.Fatal(err)
			}
			if got, err := s.AuditForwarded(ctx, to, org); err != nil || got != h {
				t.Errorf("got %v, %v, want %v", got, err, h)
			}
			if got, err := s.AuditForwarded(ctx, "tcp://other:514", org); err != nil || got.Sequence != 0 {
				t.Errorf("another destination has %v, %v", got, err)
			}
		}
		retire := func(want uint64) {
			t.Helper()
			if n, err := l.Retire(ctx, org, day(50)); err != nil || n != want {
				t.Errorf("retired %d, %v, want %d", n, err, want)
			}
		}
		waiting(org)
		retire(0)
		forwarded(4)
		waiting(org)
		retire(4)
		forwarded(10)
		retire(6)
		forwarded(12)
		waiting()
		if _, err := l.Verify(ctx, org); err != nil {
			t.Error(err)
		}
	})
}
