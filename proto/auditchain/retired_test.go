package auditchain

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

// retired is a chain of n entries whose last one retires those up to through.
func retired(t *testing.T, n int, through uint64) [][]byte {
	t.Helper()
	lines := chain(n - 1)
	head := func(line []byte) Head {
		e, err := Decode(line)
		if err != nil {
			t.Fatal(err)
		}
		h, err := HeadOf(e)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	e := Entry{Time: time.Date(2027, 11, 22, 0, 0, 0, 0, time.UTC), Action: RetireAction, Target: RetireTarget(head(lines[through-1]))}
	e.Seal(head(lines[n-2]))
	return append(lines, e.Encode())
}

func TestKeptVerifier(t *testing.T) {
	for _, test := range []struct {
		name   string
		lines  func() [][]byte
		broken uint64 // 0: whole
		reason string
		kept   Kept
	}{
		{"whole", func() [][]byte { return chain(9) }, 0, "", Kept{First: 1, Last: 9}},
		{"empty", func() [][]byte { return nil }, 0, "", Kept{}},
		{"retired", func() [][]byte { return retired(t, 9, 4)[4:] }, 0, "", Kept{First: 5, Last: 9, RetiredBy: 9}},
		{"not dropped yet", func() [][]byte { return retired(t, 9, 4) }, 0, "", Kept{First: 1, Last: 9}},
		{"dropped in part", func() [][]byte { return retired(t, 9, 4)[2:] }, 0, "", Kept{First: 3, Last: 9, RetiredBy: 9}},
		{"all but itself", func() [][]byte { return retired(t, 9, 8)[8:] }, 0, "", Kept{First: 9, Last: 9, RetiredBy: 9}},
		{"dropped without an entry", func() [][]byte { return chain(9)[4:] }, 1, "begins with entry 5", Kept{}},
		{"one more dropped", func() [][]byte { return retired(t, 9, 4)[5:] }, 5, "begins with entry 6", Kept{}},
		{"removed", func() [][]byte { return slices.Delete(retired(t, 9, 4)[4:], 1, 2) }, 6, "removed", Kept{}},
		{"reordered", func() [][]byte {
			l := retired(t, 9, 4)[4:]
			l[1], l[2] = l[2], l[1]
			return l
		}, 6, "reordered", Kept{}},
		{"first altered", func() [][]byte {
			l := retired(t, 9, 4)[4:]
			l[0] = []byte(strings.Replace(string(l[0]), "select 4", "select 5", 1))
			return l
		}, 5, "altered", Kept{}},
		{"first sealed for another chain", func() [][]byte {
			l := retired(t, 9, 4)[4:]
			e, _ := Decode(l[0])
			e.Seal(Head{Sequence: 4, Hash: [32]byte{1}})
			l[0] = e.Encode()
			return l
		}, 6, "before it was altered", Kept{}},
		{"another hash retired", func() [][]byte {
			l := chain(8)[4:]
			last, _ := Decode(l[3])
			h, _ := HeadOf(last)
			e := Entry{Time: last.Time, Action: RetireAction, Target: RetireTarget(Head{Sequence: 4, Hash: [32]byte{1}})}
			e.Seal(h)
			return append(l, e.Encode())
		}, 5, "does not follow the entry that entry 9 retires", Kept{}},
		{"the words in a statement", func() [][]byte {
			l := chain(8)
			last, _ := Decode(l[7])
			h, _ := HeadOf(last)
			first, _ := Decode(l[3])
			f, _ := HeadOf(first)
			e := Entry{Time: last.Time, Action: "sql.run", Statement: RetireTarget(f), Target: RetireTarget(f)}
			e.Seal(h)
			return append(l, e.Encode())[4:]
		}, 1, "begins with entry 5", Kept{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var k KeptVerifier
			for _, line := range test.lines() {
				k.Add(line) //nolint:errcheck // End has it, too
			}
			err := k.End()
			if test.broken == 0 {
				got := k.Kept()
				if !got.RetiredAt.IsZero() != (got.First > 1) {
					t.Errorf("retired at %s", got.RetiredAt)
				}
				got.RetiredAt = time.Time{}
				if err != nil || got != test.kept {
					t.Errorf("got %+v, %v, want %+v", got, err, test.kept)
				}
				return
			}
			var broken *BrokenError
			if !errors.As(err, &broken) || broken.Sequence != test.broken || !strings.Contains(broken.Reason, test.reason) {
				t.Errorf("got %v, want entry %d and %q", err, test.broken, test.reason)
			}
		})
	}
	kept := Kept{First: 5, Last: 9, RetiredBy: 9, RetiredAt: time.Date(2027, 11, 22, 0, 0, 0, 0, time.UTC)}
	if kept.Entries() != 5 || kept.String() != "from entry 5 on: those before were retired on 2027-11-22 00:00:00 UTC (entry 9)" || (Kept{First: 1, Last: 2}).String() != "" {
		t.Errorf("%d %s", kept.Entries(), kept)
	}
	if _, ok := RetiredHead(Entry{Sequence: 4, Action: RetireAction, Target: RetireTarget(Head{Sequence: 4})}); ok {
		t.Error("an entry retires itself")
	}
}
