package auditchain

import (
	"bytes"
	"encoding/json"
	"math"
	"reflect"
	"testing"
	"time"
)

// standard is what encoding/json makes of an entry.
func standard(t testing.TB, e Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(e); err != nil {
		t.Fatal(err)
	}
	return bytes.TrimRight(b.Bytes(), "\n")
}

// TestEncodeHasAllFields fills one field after the other, so that none is forgotten
// and none is out of place.
func TestEncodeHasAllFields(t *testing.T) {
	full := Entry{Time: time.Date(2026, 11, 22, 8, 0, 0, 5e6, time.UTC)}
	if got, want := full.Encode(), standard(t, full); !bytes.Equal(got, want) {
		t.Errorf("the empty entry: got %s, want %s", got, want)
	}
	v := reflect.ValueOf(&full).Elem()
	for i := range v.NumField() {
		switch f := v.Field(i); f.Kind() {
		case reflect.String:
			f.SetString(v.Type().Field(i).Name)
		case reflect.Uint64:
			f.SetUint(math.MaxUint64 - uint64(i))
		case reflect.Int64:
			f.SetInt(-int64(i))
		}
		if got, want := full.Encode(), standard(t, full); !bytes.Equal(got, want) {
			t.Fatalf("with %s: got %s, want %s", v.Type().Field(i).Name, got, want)
		}
	}
}

// FuzzEncode holds Encode against encoding/json.
func FuzzEncode(f *testing.F) {
	for _, s := range []string{"", "select 1", "<a href='x'>&amp;</a>", "a\"b\\c", "\b\f\n\r\t\x00\x1f\x7f", "grün \u2028\u2029 \U0001f600 \ufffd", "\xff\xfe", "a\xc3"} {
		f.Add(s, "token "+s, uint64(len(s)), int64(-3), int64(1_790_000_000_123))
	}
	f.Fuzz(func(t *testing.T, text, actor string, n uint64, d, millis int64) {
		at := time.UnixMilli(millis).UTC()
		if y := at.Year(); y < 1 || y > 9999 {
			t.Skip()
		}
		e := Entry{Time: at, Action: "sql.run", Actor: actor, Statement: text, Error: text, Rows: n, DurationMillis: d, Remote: actor}
		if got, want := e.Encode(), standard(t, e); !bytes.Equal(got, want) {
			t.Fatalf("got %s, want %s", got, want)
		}
		head := e.Seal(Head{Sequence: 41})
		if got, want := e.Encode(), standard(t, e); !bytes.Equal(got, want) {
			t.Fatalf("sealed: got %s, want %s", got, want)
		}
		if err := NewVerifier(Head{Sequence: 41}).Add(e.Encode()); err != nil {
			t.Fatal(err)
		}
		if head.Sequence != 42 {
			t.Fatalf("got number %d, want 42", head.Sequence)
		}
	})
}

func BenchmarkSealAndEncode(b *testing.B) {
	b.ReportAllocs()
	head := Head{}
	for b.Loop() {
		e := Entry{
			Time: time.Unix(1_790_000_000, 0), Organization: "org_0", Actor: "token ana", Role: "analyst", Action: "sql.run", Source: "shop", QueryID: "wire_abc_1",
			Verdict: "allowed", Statement: "SELECT abalance FROM pgbench_accounts WHERE aid = 4711;", Outcome: "done", Rows: 1, Bytes: 77,
		}
		head = e.Seal(head)
		e.Encode()
	}
}
