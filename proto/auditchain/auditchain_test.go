package auditchain

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

func chain(n int) [][]byte {
	var head Head
	var lines [][]byte
	for i := range n {
		e := Entry{
			Time: time.Date(2026, 11, 22, 1, 2, 3, i*1e6, time.UTC), Action: "sql.run", Actor: "token ci",
			Statement: fmt.Sprintf("select %d as \"<é>\"", i), Rows: uint64(i),
		}
		head = e.Seal(head)
		lines = append(lines, e.Encode())
	}
	return lines
}

func verify(lines [][]byte) error {
	v := NewVerifier(Head{})
	var err error
	for _, l := range lines {
		err = v.Add(l)
	}
	return err
}

func TestVerify(t *testing.T) {
	tests := []struct {
		name   string
		tamper func([][]byte) [][]byte
		at     uint64 // 0: whole
		reason string
	}{
		{"whole", func(l [][]byte) [][]byte { return l }, 0, ""},
		{"removed", func(l [][]byte) [][]byte { return slices.Delete(l, 3, 4) }, 4, "removed"},
		{"first removed", func(l [][]byte) [][]byte { return l[1:] }, 1, "removed"},
		{"reordered", func(l [][]byte) [][]byte { l[2], l[3] = l[3], l[2]; return l }, 3, "reordered"},
		{"repeated", func(l [][]byte) [][]byte { return slices.Insert(l, 4, l[3]) }, 5, "repeated"},
		{"altered", func(l [][]byte) [][]byte {
			l[5] = []byte(strings.Replace(string(l[5]), "select 5", "select 6", 1))
			return l
		}, 6, "altered"},
		{"altered and sealed again", func(l [][]byte) [][]byte {
			e, _ := Decode(l[5])
			before, _ := Decode(l[4])
			e.Statement = "select 6"
			var prev Head
			hex.Decode(prev.Hash[:], []byte(before.Hash)) //nolint:errcheck // it is hex
			prev.Sequence = before.Sequence
			e.Seal(prev)
			l[5] = e.Encode()
			return l
		}, 7, "before it was altered"},
		{"space added", func(l [][]byte) [][]byte { l[1] = append(l[1], ' '); return l }, 2, "canonical"},
		{"unknown field", func(l [][]byte) [][]byte {
			l[1] = []byte(strings.Replace(string(l[1]), "{", `{"x":1,`, 1))
			return l
		}, 2, "unknown field"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := verify(tt.tamper(chain(9)))
			if tt.at == 0 {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			var broken *BrokenError
			if !errors.As(err, &broken) {
				t.Fatalf("got %v, want a BrokenError", err)
			}
			if broken.Sequence != tt.at || !strings.Contains(broken.Reason, tt.reason) {
				t.Errorf("got %v, want entry %d and %q", broken, tt.at, tt.reason)
			}
		})
	}
}

func TestSealBounds(t *testing.T) {
	e := Entry{Action: "sql.run", Statement: strings.Repeat("é", MaxStatement), Error: "bad \xff byte"}
	e.Seal(Head{})
	line := e.Encode()
	if len(line) > MaxLine {
		t.Errorf("line of %d bytes", len(line))
	}
	if err := verify([][]byte{line}); err != nil {
		t.Error(err)
	}
}

func FuzzVerify(f *testing.F) {
	lines := chain(2)
	f.Add(lines[0], lines[1])
	f.Fuzz(func(t *testing.T, a, b []byte) {
		v := NewVerifier(Head{})
		if v.Add(a) == nil {
			if e, err := Decode(a); err != nil || e.Sequence != 1 {
				t.Fatalf("accepted %q", a)
			}
			v.Add(b) //nolint:errcheck // only must not panic
		}
	})
}
