package query

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// books are where a test's journal writes.
type books struct {
	mu      sync.Mutex
	fails   error
	entries []string
	records []string
	batches int
}

func (b *books) journal(t *testing.T) *Journal {
	return NewJournal(JournalConfig{
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Record: func(_ context.Context, records []Record) error {
			b.mu.Lock()
			defer b.mu.Unlock()
			if b.fails != nil {
				return b.fails
			}
			b.batches++
			for _, r := range records {
				b.records = append(b.records, fmt.Sprint(r.Query.Id, " ", r.Query.State, " ", r.Known))
			}
			return nil
		},
		Append: func(_ context.Context, entries []Entry) error {
			b.mu.Lock()
			defer b.mu.Unlock()
			if b.fails != nil {
				return b.fails
			}
			for _, e := range entries {
				b.entries = append(b.entries, fmt.Sprint(e.Action, " ", e.SessionID, " ", e.Query.Id, " ", e.Verdict, " ", e.Query.State, " ", e.Query.Error.GetMessage()))
			}
			return nil
		},
	})
}

func session(cancel func(string)) WireSession {
	return WireSession{
		ID: "ses", Principal: &posternv1.Principal{Organization: "org", TokenId: "tok", TokenName: "ana"}, Agent: "lab", Source: "shop",
		Cancel: func(_ context.Context, id string, _ *posternv1.Principal) error { cancel(id); return nil },
	}
}

func event(id string, state posternv1.WireEvent_State, failure *posternv1.ErrorDetail) *posternv1.WireEvent {
	return &posternv1.WireEvent{StatementId: id, State: state, Sql: "select " + id, Verdict: "allowed", Duration: durationpb.New(time.Millisecond), Error: failure}
}

const (
	running = posternv1.WireEvent_STATE_RUNNING
	over    = posternv1.WireEvent_STATE_ENDED
)

func TestJournal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &books{}
		j := b.journal(t)
		e, err := j.Open(t.Context(), session(func(string) {}))
		if err != nil {
			t.Fatal(err)
		}
		e.Event(event("q1", over, nil))
		e.Event(event("q2", running, nil))
		e.Event(event("q2", running, nil)) // said twice
		denied := event("q3", over, &posternv1.ErrorDetail{Code: proto.CodePolicyDenied, Message: "no"})
		denied.Verdict = "denied"
		e.Event(denied)
		e.Event(event("q2", over, &posternv1.ErrorDetail{Code: proto.CodeSQL, Message: "boom"}))
		e.Event(event("q4", running, nil))
		e.Event(event("q5", 99, nil)) // a newer host's
		e.Close(errors.New("agent lab went away"))
		time.Sleep(2 * batchTime)
		j.Close()
		if got, want := strings.Join(b.entries, "; "), "wire.open ses  allowed  ; sql.run ses q1 allowed done ; sql.run ses q3 denied denied no; sql.run ses q2 allowed failed boom; "+
			"sql.run ses q4 allowed failed the session ended: agent lab went away; wire.close ses   failed agent lab went away"; got != want {
			t.Errorf("audit:\n%s, want\n%s", got, want)
		}
		if got, want := strings.Join(b.records, "; "), "q1 done false; q2 running false; q3 denied false; q2 failed true; q4 running false; q4 failed true"; got != want {
			t.Errorf("history:\n%s, want\n%s", got, want)
		}
		if b.batches != 1 || len(j.running) != 0 {
			t.Errorf("%d batches, %d running", b.batches, len(j.running))
		}
	})
}

// TestJournalWaits: what can't be written holds up its sessions and is not lost.
func TestJournalWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &books{}
		j := b.journal(t)
		e, err := j.Open(t.Context(), session(func(string) {}))
		if err != nil {
			t.Fatal(err)
		}
		b.fails = proto.Errorf(proto.CodeStorageFull, "no space is left")
		const n = 3 * queueMost
		told := 0
		done := make(chan struct{})
		go func() {
			defer close(done)
			for i := range n {
				e.Event(event(fmt.Sprint("q", i), over, nil))
				told++
			}
			e.Close(nil)
		}()
		time.Sleep(time.Minute)
		synctest.Wait()
		if told < queueMost || told > queueMost+2*batchMost {
			t.Errorf("%d events were taken while nothing could be written", told)
		}
		if _, err := j.Open(t.Context(), session(func(string) {})); proto.CodeOf(err) != proto.CodeUnavailable {
			t.Errorf("a session began: %v", err)
		}
		b.mu.Lock()
		b.fails = nil
		b.mu.Unlock()
		<-done
		j.Close()
		if len(b.records) != n || b.records[0] != "q0 done false" || b.records[n-1] != fmt.Sprintf("q%d done false", n-1) || len(b.entries) != n+2 {
			t.Errorf("%d records, %d entries are written", len(b.records), len(b.entries))
		}
	})
}

// TestJournalGivesUp: a control plane that stops does not wait forever.
func TestJournalGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &books{}
		j := b.journal(t)
		e, err := j.Open(t.Context(), session(func(string) {}))
		if err != nil {
			t.Fatal(err)
		}
		b.fails = errors.New("broken")
		e.Event(event("q", over, nil))
		e.Close(nil)
		began := time.Now()
		j.Close()
		if took := time.Since(began); took < lastTries || took > lastTries+retryEvery {
			t.Errorf("it took %s", took)
		}
	})
}

func TestJournalCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &books{}
		j := b.journal(t)
		var e *WireEntries
		var err error
		e, err = j.Open(t.Context(), session(func(id string) {
			go e.Event(event(id, over, &posternv1.ErrorDetail{Code: proto.CodeCancelled}))
		}))
		if err != nil {
			t.Fatal(err)
		}
		e.Event(event("q", running, nil))
		may := func(*posternv1.Principal) error { return nil }
		for name, c := range map[string]struct {
			org, id string
			found   bool
		}{"another organization": {"elsewhere", "q", false}, "unknown": {"org", "x", false}} {
			if found, err := j.Cancel(t.Context(), &posternv1.Principal{Organization: c.org}, c.id, may); found != c.found || err != nil {
				t.Errorf("%s: got %v, %v", name, found, err)
			}
		}
		no := errors.New("no")
		if _, err := j.Cancel(t.Context(), &posternv1.Principal{Organization: "org"}, "q", func(*posternv1.Principal) error { return no }); err != no {
			t.Errorf("got %v", err)
		}
		if found, err := j.Cancel(t.Context(), &posternv1.Principal{Organization: "org"}, "q", may); !found || err != nil {
			t.Errorf("got %v, %v", found, err)
		}
		b.mu.Lock()
		if got := strings.Join(b.records, "; "); got != "q running false; q cancelled true" {
			t.Errorf("when it has returned the history is %s", got)
		}
		b.mu.Unlock()
		e.Close(nil)
		j.Close()
	})
}
