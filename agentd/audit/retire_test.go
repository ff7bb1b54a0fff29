package audit

import (
	"bytes"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto/auditchain"
)

// A kept is a log whose clock stands until it is moved.
type kept struct {
	*Log
	t     *testing.T
	state string
	now   atomic.Int64
	fault atomic.Pointer[string]
}

func newKept(t *testing.T, segment int64) *kept {
	t.Helper()
	k := &kept{t: t, state: t.TempDir()}
	k.now.Store(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano())
	k.open(segment)
	return k
}

func (k *kept) open(segment int64) {
	k.t.Helper()
	l, _, err := Open(k.state, Config{SegmentBytes: segment, Now: k.clock, Fault: func(op string) error {
		if at := k.fault.Load(); at != nil && *at == op {
			return errors.New("the disk is gone")
		}
		return nil
	}})
	if err != nil {
		k.t.Fatal(err)
	}
	k.Log = l
	k.t.Cleanup(func() { l.Close() }) //nolint:errcheck // it never fails
}

func (k *kept) clock() time.Time { return time.Unix(0, k.now.Load()) }

// days adds n entries on each of some days.
func (k *kept) days(days, n int) {
	k.t.Helper()
	for range days {
		for range n {
			if err := k.AppendSoon(k.t.Context(), auditchain.Entry{Action: ActionRun, QueryID: "q", Statement: "select 1"}); err != nil {
				k.t.Fatal(err)
			}
		}
		k.now.Add(int64(24 * time.Hour))
	}
	k.writing.Lock()
	defer k.writing.Unlock()
	if err := k.sync(); err != nil {
		k.t.Fatal(err)
	}
}

func (k *kept) retire(r Retention, limit uint64) uint64 {
	k.t.Helper()
	n, err := k.Retire(k.t.Context(), r, limit)
	if err != nil {
		k.t.Fatal(err)
	}
	return n
}

// check verifies the log, on the disk and as it is opened, from an entry to another.
func (k *kept) check(first, last uint64) {
	k.t.Helper()
	found, err := Verify(k.state)
	if err != nil || found.Kept.First != first || found.Head.Sequence != last {
		k.t.Fatalf("verify: %+v, %v; want %d to %d", found, err, first, last)
	}
	if _, got := k.Retired(); got != first {
		k.t.Errorf("the first entry is %d, want %d", got, first)
	}
	page, err := k.Read(1, 1)
	if err != nil || len(page) != 1 {
		k.t.Fatalf("read: %d lines, %v", len(page), err)
	}
	if e, err := auditchain.Decode(page[0]); err != nil || e.Sequence != first {
		k.t.Errorf("reading begins with entry %d, %v", e.Sequence, err)
	}
}

func TestRetireByAge(t *testing.T) {
	k := newKept(t, 1<<20)
	k.SetRetention(Retention{Age: 72 * time.Hour})
	k.days(10, 4) // 40 entries, a segment each day
	files, err := segments(Dir(k.state))
	if err != nil || len(files) != 10 {
		t.Fatalf("%d segments, %v", len(files), err)
	}
	if n := k.retire(Retention{Age: 72 * time.Hour}, 0); n != 0 {
		t.Errorf("%d were dropped of which the control plane knows nothing", n)
	}
	if n := k.retire(Retention{}, math.MaxUint64); n != 0 {
		t.Errorf("%d were dropped without a reason", n)
	}
	if n := k.retire(Retention{Age: 72 * time.Hour}, 9); n != 8 {
		t.Errorf("%d were dropped up to entry 9, want two segments", n)
	}
	k.check(9, 41)
	// Seven days are older than three.
	if n := k.retire(Retention{Age: 72 * time.Hour}, math.MaxUint64); n != 20 {
		t.Errorf("%d were dropped", n)
	}
	k.check(29, 42)
	if n, _ := k.Retired(); n != 28 {
		t.Errorf("%d are counted", n)
	}
	if n := k.retire(Retention{Age: 72 * time.Hour}, math.MaxUint64); n != 0 {
		t.Errorf("%d were dropped again", n)
	}
	k.Close() //nolint:errcheck // it never fails
	k.open(1 << 20)
	k.check(29, 42)
	k.days(1, 1)
	k.check(29, 43)
	// However old, the newest segment stays, and with it what stands for the others.
	k.now.Add(int64(1000 * time.Hour))
	k.retire(Retention{Age: time.Hour}, math.MaxUint64)
	k.Close() //nolint:errcheck // it never fails
	k.open(1 << 20)
	if found, err := Verify(k.state); err != nil || found.Head.Sequence < 44 {
		t.Errorf("%+v, %v", found, err)
	}
}

func TestRetireBySize(t *testing.T) {
	k := newKept(t, 2000)
	k.days(1, 200)
	_, before := k.Stats()
	k.retire(Retention{Bytes: before / 2}, math.MaxUint64)
	_, size := k.Stats()
	if size > before/2+2000 || size < before/4 {
		t.Errorf("%d bytes are left of %d", size, before)
	}
	files, err := segments(Dir(k.state))
	if err != nil {
		t.Fatal(err)
	}
	var sum int64
	for _, f := range files {
		st, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		sum += st.Size()
	}
	if sum != size {
		t.Errorf("there are %d bytes, %d are counted", sum, size)
	}
	_, first := k.Retired()
	k.check(first, 201)
}

// TestRetireCrash: killed after the entry, after some of the files, it goes on.
func TestRetireCrash(t *testing.T) {
	k := newKept(t, 1<<20)
	k.SetRetention(Retention{Age: 24 * time.Hour})
	k.days(6, 2)
	op := "remove"
	k.fault.Store(&op)
	if n, err := k.Retire(t.Context(), Retention{Age: 24 * time.Hour}, math.MaxUint64); err == nil || n != 0 {
		t.Fatalf("%d, %v", n, err)
	}
	k.check(1, 13) // the entry is there, the others too
	files, err := segments(Dir(k.state))
	if err != nil {
		t.Fatal(err)
	}
	k.Close() //nolint:errcheck // it never fails
	if err := os.Remove(files[0]); err != nil {
		t.Fatal(err)
	}
	k.fault.Store(nil)
	k.open(1 << 20)
	k.check(3, 13)
	k.retire(Retention{Age: 24 * time.Hour}, math.MaxUint64)
	_, first := k.Retired()
	k.check(first, 14)
	if first < 9 {
		t.Errorf("the first is %d", first)
	}
}

func TestRetireWithoutSpaceDropsNothing(t *testing.T) {
	for _, op := range []string{"write", "fsync"} {
		k := newKept(t, 1<<20)
		k.SetRetention(Retention{Age: 24 * time.Hour})
		k.days(5, 2)
		k.fault.Store(&op)
		if n, err := k.Retire(t.Context(), Retention{Age: 24 * time.Hour}, math.MaxUint64); err == nil || n != 0 {
			t.Errorf("%s: %d, %v", op, n, err)
		}
		k.fault.Store(nil)
		k.check(1, 10)
	}
}

// TestRetireCoversNothingUp: what was done to a log before it was retired is found, and what
// somebody drops without an entry, or beyond it, too.
func TestRetireCoversNothingUp(t *testing.T) {
	age := Retention{Age: 24 * time.Hour}
	for name, c := range map[string]struct {
		// open: agentd runs meanwhile.
		open  bool
		spoil func(t *testing.T, files []string)
	}{
		"altered": {true, func(t *testing.T, files []string) { rewrite(t, files[1], "select", "delete") }},
		"cut where what stays begins": {true, func(t *testing.T, files []string) {
			text, err := os.ReadFile(files[4]) // the last that goes, of which every entry that is left is whole
			if err == nil {
				err = os.WriteFile(files[4], text[:bytes.IndexByte(text, '\n')+1], 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}},
		"removed": {true, func(t *testing.T, files []string) { remove(t, files[0]) }},
		"removed in the middle": {true, func(t *testing.T, files []string) {
			remove(t, files[1])
			if err := os.Rename(files[0], files[1]); err != nil {
				t.Fatal(err)
			}
		}},
		"beyond the entry": {false, func(t *testing.T, files []string) { remove(t, files[2]); remove(t, files[3]) }},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKept(t, 1<<20)
			k.SetRetention(age)
			k.days(6, 2)
			files, err := segments(Dir(k.state))
			if err != nil {
				t.Fatal(err)
			}
			if !c.open {
				k.retire(age, 4)
				k.Close() //nolint:errcheck // it never fails
			}
			c.spoil(t, files)
			var bad *TamperedError
			if c.open {
				if n, err := k.Retire(t.Context(), age, math.MaxUint64); !errors.As(err, &bad) || n != 0 {
					t.Errorf("retired %d, %v", n, err)
				}
				k.Close() //nolint:errcheck // it never fails
			}
			if _, err := Verify(k.state); !errors.As(err, &bad) || strings.Contains(err.Error(), "\n") {
				t.Errorf("verify: %v", err)
			}
			l, _, err := Open(k.state, Config{})
			if err == nil {
				l.Close() //nolint:errcheck // it never fails
			}
			if name != "altered" && !errors.As(err, &bad) {
				t.Errorf("open: %v", err)
			}
		})
	}
}

// TestReadersWhileRetired: nobody who reads meanwhile sees a gap or an error.
func TestReadersWhileRetired(t *testing.T) {
	k := newKept(t, 1500)
	k.days(1, 300)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := Verify(k.state); err != nil {
					t.Error(err)
					return
				}
				last := uint64(0)
				if err := List(k.state, 1, func(_ []byte, e auditchain.Entry) error {
					if e.Sequence <= last {
						t.Errorf("entry %d after %d", e.Sequence, last)
					}
					last = e.Sequence
					return nil
				}); err != nil {
					t.Error(err)
					return
				}
				if _, err := k.Read(1, 50); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	_, size := k.Stats()
	for n := size; n > 3000; n -= 2500 {
		k.retire(Retention{Bytes: n}, math.MaxUint64)
	}
	close(stop)
	wg.Wait()
	if _, err := Verify(k.state); err != nil {
		t.Error(err)
	}
}

func remove(t *testing.T, file string) {
	t.Helper()
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
}

func rewrite(t *testing.T, file, from, to string) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Clean(file))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(strings.Replace(string(raw), from, to, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
}
