package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
)

func mustOpen(t *testing.T, state string, cfg Config) (*Log, Recovery) {
	t.Helper()
	l, r, err := Open(state, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l, r
}

func mustAppend(t *testing.T, l *Log, action, query string) {
	t.Helper()
	if err := l.Append(context.Background(), auditchain.Entry{Action: action, QueryID: query, Statement: "select 'sql.begin'"}); err != nil {
		t.Fatal(err)
	}
}

func mustVerify(t *testing.T, state string, want uint64) {
	t.Helper()
	found, err := Verify(state)
	if err != nil || found.Torn || found.Head.Sequence != want {
		t.Fatalf("verify: %+v, %v; want %d whole entries", found, err, want)
	}
}

func TestAppendReadReopen(t *testing.T) {
	state := t.TempDir()
	l, _ := mustOpen(t, state, Config{SegmentBytes: 2000})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 25 {
				mustAppend(t, l, ActionRun, "q")
			}
		})
	}
	wg.Wait()
	if l.Head().Sequence != 200 {
		t.Fatalf("head %d", l.Head().Sequence)
	}
	mustVerify(t, state, 200)
	files, err := segments(Dir(state))
	if err != nil || len(files) < 3 {
		t.Fatalf("%d segments, %v", len(files), err)
	}
	v := auditchain.NewVerifier(auditchain.Head{})
	for from := uint64(1); ; {
		page, err := l.Read(from, 7)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			break
		}
		for _, line := range page {
			if err := v.Add(line); err != nil {
				t.Fatal(err)
			}
		}
		from += uint64(len(page))
	}
	if v.Head() != l.Head() {
		t.Errorf("read up to %d", v.Head().Sequence)
	}
	head := l.Head()
	l.Close() //nolint:errcheck // checked by the clean-up
	if err := l.Append(context.Background(), auditchain.Entry{Action: "x"}); !errors.Is(err, ErrClosed) {
		t.Errorf("append after close: %v", err)
	}
	again, r := mustOpen(t, state, Config{SegmentBytes: 2000})
	if again.Head() != head || r.Torn != "" || len(r.Begun) != 0 {
		t.Errorf("head %v, recovery %+v", again.Head(), r)
	}
	mustAppend(t, again, ActionRun, "q")
	mustVerify(t, state, 201)
	seen := 0
	err = List(state, 200, func([]byte, auditchain.Entry) error { seen++; return nil })
	if err != nil || seen != 2 {
		t.Errorf("listed %d, %v", seen, err)
	}
}

// TestTornTail cuts the log at every byte of its last line.
func TestTornTail(t *testing.T) {
	state := t.TempDir()
	l, _ := mustOpen(t, state, Config{})
	for range 3 {
		mustAppend(t, l, ActionRun, "q")
	}
	l.Close() //nolint:errcheck // checked by the clean-up
	whole, err := os.ReadFile(filepath.Join(Dir(state), "000001.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	second := bytes.LastIndexByte(whole[:len(whole)-1], '\n') + 1
	for cut := second + 1; cut < len(whole); cut += 7 {
		state := t.TempDir()
		if err := os.MkdirAll(Dir(state), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(Dir(state), "000001.jsonl"), whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		if found, err := Verify(state); !found.Torn || err != nil {
			t.Fatalf("cut at %d: %+v, %v", cut, found, err)
		}
		l, r := mustOpen(t, state, Config{})
		if r.Torn == "" || l.Head().Sequence != 2 {
			t.Fatalf("cut at %d: %+v, head %d", cut, r, l.Head().Sequence)
		}
		if aside, err := os.ReadFile(r.Torn); err != nil || !bytes.Equal(aside, whole[second:cut]) {
			t.Fatalf("set aside %q, %v", aside, err)
		}
		mustAppend(t, l, ActionRun, "q")
		mustVerify(t, state, 3)
	}
}

func TestTamperingIsNeverMended(t *testing.T) {
	for name, spoil := range map[string]func([]byte) []byte{
		"altered":            func(b []byte) []byte { return bytes.Replace(b, []byte("select"), []byte("delete"), 1) },
		"removed":            func(b []byte) []byte { return b[bytes.IndexByte(b, '\n')+1:] },
		"terminated garbage": func(b []byte) []byte { return append(b, "garbage\n"...) },
		"empty line":         func(b []byte) []byte { return append(b, '\n') },
	} {
		t.Run(name, func(t *testing.T) {
			state := t.TempDir()
			l, _ := mustOpen(t, state, Config{})
			for range 3 {
				mustAppend(t, l, ActionRun, "q")
			}
			l.Close() //nolint:errcheck // checked by the clean-up
			file := filepath.Join(Dir(state), "000001.jsonl")
			raw, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			spoiled := spoil(raw)
			if err := os.WriteFile(file, spoiled, 0o600); err != nil {
				t.Fatal(err)
			}
			var bad *TamperedError
			if _, _, err := Open(state, Config{}); !errors.As(err, &bad) || strings.Contains(err.Error(), "\n") {
				t.Errorf("open: %v", err)
			}
			if _, err := Verify(state); !errors.As(err, &bad) {
				t.Errorf("verify: %v", err)
			}
			if now, err := os.ReadFile(file); err != nil || !bytes.Equal(now, spoiled) {
				t.Error("the file was changed")
			}
		})
	}
	t.Run("segment missing", func(t *testing.T) {
		state := t.TempDir()
		l, _ := mustOpen(t, state, Config{SegmentBytes: 100})
		for range 3 {
			mustAppend(t, l, ActionRun, "q")
		}
		l.Close() //nolint:errcheck // checked by the clean-up
		if err := os.Remove(filepath.Join(Dir(state), "000002.jsonl")); err != nil {
			t.Fatal(err)
		}
		var bad *TamperedError
		if _, _, err := Open(state, Config{}); !errors.As(err, &bad) {
			t.Errorf("open: %v", err)
		}
		if _, err := Verify(state); !errors.As(err, &bad) {
			t.Errorf("verify: %v", err)
		}
	})
}

func TestFailedWrites(t *testing.T) {
	for _, op := range []string{"write", "fsync", "create"} {
		t.Run(op, func(t *testing.T) {
			state := t.TempDir()
			var mu sync.Mutex
			full := false
			l, _ := mustOpen(t, state, Config{SegmentBytes: 1000, Fault: func(at string) error {
				mu.Lock()
				defer mu.Unlock()
				if full && at == op {
					return fmt.Errorf("%s: %w", at, unix.ENOSPC)
				}
				return nil
			}})
			for i := range uint64(30) {
				mu.Lock()
				full = i%3 == 1
				mu.Unlock()
				before := l.Head()
				err := l.Append(context.Background(), auditchain.Entry{Action: ActionRun})
				if err != nil && (proto.CodeOf(err) != proto.CodeStorageFull || l.Head() != before) {
					t.Fatalf("%v, head %d", err, l.Head().Sequence)
				}
				if err == nil && full && op != "create" {
					t.Fatal("it passed on a full disk")
				}
			}
			mustVerify(t, state, l.Head().Sequence)
			if l.Head().Sequence < 20 {
				t.Errorf("only %d entries", l.Head().Sequence)
			}
		})
	}
}

func TestBegunQueriesAreFound(t *testing.T) {
	for _, size := range []int64{1 << 20, 100} { // one segment, and a segment each
		state := t.TempDir()
		l, _ := mustOpen(t, state, Config{SegmentBytes: size})
		mustAppend(t, l, ActionBegin, "before the start")
		mustAppend(t, l, ActionStart, "")
		mustAppend(t, l, ActionBegin, "one")
		mustAppend(t, l, ActionBegin, "two")
		mustAppend(t, l, ActionRun, "one")
		mustAppend(t, l, ActionBegin, "three")
		mustAppend(t, l, ActionBegin, "four")
		mustAppend(t, l, ActionLost, "three")
		l.Close() //nolint:errcheck // checked by the clean-up
		_, r := mustOpen(t, state, Config{SegmentBytes: size})
		if len(r.Begun) != 2 || r.Begun[0].QueryID != "two" || r.Begun[1].QueryID != "four" {
			t.Errorf("segments of %d: got %+v", size, r.Begun)
		}
	}
}

func FuzzOpen(f *testing.F) {
	e := auditchain.Entry{Action: ActionBegin, QueryID: "q"}
	e.Seal(auditchain.Head{})
	f.Add(append(e.Encode(), '\n'))
	f.Add([]byte("{}\n{"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		state := t.TempDir()
		if err := os.MkdirAll(Dir(state), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(Dir(state), "000001.jsonl"), raw, 0o600); err != nil {
			t.Fatal(err)
		}
		l, _, err := Open(state, Config{})
		if err != nil {
			return
		}
		defer l.Close() //nolint:errcheck // nothing was written
		found, err := Verify(state)
		if err != nil || found.Torn || found.Head != l.Head() {
			t.Fatal(found, err)
		}
	})
}

func soon(t *testing.T, l *Log, action, query string) error {
	t.Helper()
	return l.AppendSoon(t.Context(), auditchain.Entry{Action: action, QueryID: query})
}

func TestAppendSoon(t *testing.T) {
	state := t.TempDir()
	var broken atomic.Bool
	l, _ := mustOpen(t, state, Config{SegmentBytes: 2000, Fault: func(op string) error {
		if broken.Load() && op == "fsync" {
			return errors.New("the disk is gone")
		}
		return nil
	}})
	mustAppend(t, l, ActionStart, "")
	if err := soon(t, l, ActionRun, "q1"); err != nil {
		t.Fatal(err)
	}
	// It is in the file at once, and in the head soon.
	mustVerify(t, state, 2)
	for end := time.Now().Add(time.Minute); l.Head().Sequence != 2; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it is never on stable storage")
		}
	}
	// What the disk failed to keep is written again before anything else.
	broken.Store(true)
	for i := range 20 { // over the edge of a segment
		if err := soon(t, l, ActionRun, fmt.Sprint("q", i)); err != nil {
			break
		}
	}
	accepted := l.tip.Sequence
	if err := l.Append(t.Context(), auditchain.Entry{Action: ActionRun}); err == nil {
		t.Error("an entry was kept by a broken disk")
	}
	if err := soon(t, l, ActionRun, "lost"); err == nil {
		t.Error("an entry was accepted although those before it are not kept")
	}
	if l.Head().Sequence > 2 {
		t.Errorf("the head is %d", l.Head().Sequence)
	}
	broken.Store(false)
	mustAppend(t, l, ActionRun, "after")
	if got := l.Head().Sequence; got != accepted+1 {
		t.Errorf("the head is %d, want %d", got, accepted+1)
	}
	if err := soon(t, l, ActionRun, "last"); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := soon(t, l, ActionRun, "closed"); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	mustVerify(t, state, accepted+2)
}

func TestBegunSessionsAreFound(t *testing.T) {
	state := t.TempDir()
	l, _ := mustOpen(t, state, Config{})
	for _, e := range []auditchain.Entry{
		{Action: ActionStart},
		{Action: ActionWireOpen, SessionID: "w1"},
		{Action: ActionWireOpen, SessionID: "w2"},
		{Action: ActionBegin, QueryID: "w2_1", SessionID: "w2"},
		{Action: ActionWireClose, SessionID: "w1"},
	} {
		if err := l.AppendSoon(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l, found := mustOpen(t, state, Config{})
	defer l.Close() //nolint:errcheck // nothing was written
	if len(found.Begun) != 2 || found.Begun[0].SessionID != "w2" || found.Begun[1].QueryID != "w2_1" {
		t.Errorf("found %v", found.Begun)
	}
}
