package pgwire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func pairs(texts ...string) []byte {
	var b []byte
	for _, t := range texts {
		b = cstring(b, t)
	}
	return append(b, 0)
}

func TestParseStartup(t *testing.T) {
	for name, c := range map[string]struct {
		version  uint32
		rest     []byte
		state    string // of the error; empty for none
		database string
		settings string
		minor    uint32
		options  []string
	}{
		"plain":               {version: 3 << 16, rest: pairs("user", "u", "database", "a/b"), database: "a/b"},
		"no database":         {version: 3 << 16, rest: pairs("user", "u"), database: "u"},
		"no user":             {version: 3 << 16, rest: pairs("database", "a/b"), state: "28000"},
		"settings":            {version: 3 << 16, rest: pairs("user", "u", "datestyle", "ISO", "application_name", "psql"), database: "u", settings: "datestyle=ISO application_name=psql"},
		"options":             {version: 3 << 16, rest: pairs("user", "u", "options", `-c search_path=a\ b -cTimeZone=UTC --statement-timeout=5s`), database: "u", settings: "search_path=a b TimeZone=UTC statement_timeout=5s"},
		"beside options":      {version: 3 << 16, rest: pairs("user", "u", "TimeZone", "x", "options", "-c timezone=y"), database: "u", settings: "TimeZone=x"},
		"read only by option": {version: 3 << 16, rest: pairs("user", "u", "options", "-c default_transaction_read_only=off"), state: "42501"},
		"role by option":      {version: 3 << 16, rest: pairs("user", "u", "options", "-c role=postgres"), state: "42501"},
		"dashes":              {version: 3 << 16, rest: pairs("user", "u", "options", "--session-authorization=x"), state: "42501"},
		"another option":      {version: 3 << 16, rest: pairs("user", "u", "options", "-d 5"), state: "42501"},
		"no value":            {version: 3 << 16, rest: pairs("user", "u", "options", "-c search_path"), state: "22023"},
		"unfinished -c":       {version: 3 << 16, rest: pairs("user", "u", "options", "-c"), state: "22023"},
		"direct setting":      {version: 3 << 16, rest: pairs("user", "u", "session_replication_role", "replica"), state: "42501"},
		"replication":         {version: 3 << 16, rest: pairs("user", "u", "replication", "database"), state: "0A000"},
		"replication on":      {version: 3 << 16, rest: pairs("user", "u", "replication", "1"), state: "0A000"},
		"no replication":      {version: 3 << 16, rest: pairs("user", "u", "replication", "false"), database: "u"},
		"3.2":                 {version: 3<<16 | 2, rest: pairs("user", "u"), database: "u", minor: 2},
		"3.1 is 3.0":          {version: 3<<16 | 1, rest: pairs("user", "u"), database: "u", options: []string{}},
		"grease":              {version: 3<<16 | 9999, rest: pairs("user", "u", "_pq_.test", "x"), database: "u", minor: 2, options: []string{"_pq_.test"}},
		"2.0":                 {version: 2 << 16, rest: pairs("user", "u"), state: "0A000"},
		"4.0":                 {version: 4 << 16, rest: pairs("user", "u"), state: "0A000"},
		"empty":               {version: 3 << 16, rest: nil, state: "08P01"},
		"no terminator":       {version: 3 << 16, rest: []byte("user\x00u\x00"), state: "08P01"},
		"half a pair":         {version: 3 << 16, rest: []byte("user\x00u"), state: "08P01"},
		"early terminator":    {version: 3 << 16, rest: []byte("user\x00u\x00\x00x\x00y\x00\x00"), state: "08P01"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseStartup(c.version, c.rest)
			if c.state != "" {
				var f *fatal
				if !errors.As(err, &f) || f.state != c.state {
					t.Fatalf("got %+v, %v, want SQLSTATE %s", got, err, c.state)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var settings []string
			for _, s := range got.settings {
				settings = append(settings, s.Name+"="+s.Value)
			}
			if got.database != c.database || strings.Join(settings, " ") != c.settings || got.minor != c.minor ||
				got.downgraded != (c.options != nil) || !slices.Equal(got.options, c.options) && len(c.options) > 0 {
				t.Errorf("got %+v, settings %v", got, settings)
			}
		})
	}
}

func FuzzParseStartup(f *testing.F) {
	f.Add(uint32(3<<16), pairs("user", "u", "database", "a/b", "options", `-c a=b\ c`))
	f.Add(uint32(3<<16|9999), pairs("_pq_.x", ""))
	f.Fuzz(func(t *testing.T, version uint32, rest []byte) {
		s, err := parseStartup(version, rest)
		if err != nil {
			var fatal *fatal
			if !errors.As(err, &fatal) || len(fatal.state) != 5 {
				t.Fatalf("got %v", err)
			}
			return
		}
		if s.user == "" || s.minor > newestMinor {
			t.Fatalf("got %+v", s)
		}
		for i, one := range s.settings {
			if !mayBegin(one.Name) {
				t.Errorf("setting %q got through", one.Name)
			}
			for _, other := range s.settings[:i] {
				if strings.EqualFold(other.Name, one.Name) {
					t.Errorf("%q stands twice", one.Name)
				}
			}
		}
	})
}

// FuzzMeter cuts a stream of messages in any place: what is counted stays the same.
func FuzzMeter(f *testing.F) {
	f.Add([]byte{3, 1, 7}, []byte{5, 0, 1, 200, 30, 2})
	f.Fuzz(func(t *testing.T, cuts, sizes []byte) {
		var stream []byte
		var want []string
		for i, size := range sizes {
			kind := byte('A' + i%26)
			body := bytes.Repeat([]byte{size}, int(size))
			stream = message(stream, kind, body...)
			first := byte(0)
			if size > 0 {
				first = size
			}
			want = append(want, fmt.Sprint(kind, first))
		}
		var got []string
		begun := 0
		m := meter{begun: func(byte) { begun++ }, ended: func(kind, first byte) { got = append(got, fmt.Sprint(kind, first)) }}
		for i := 0; len(stream) > 0; i++ {
			n := len(stream)
			if i < len(cuts) {
				n = min(n, int(cuts[i]))
			}
			m.add(stream[:n])
			if whole := n == len(stream); whole && !m.edge() {
				t.Error("no edge at the end")
			}
			stream = stream[n:]
		}
		if !slices.Equal(got, want) || begun != len(want) {
			t.Errorf("got %v (%d begun), want %v", got, begun, want)
		}
	})
}

func TestMeterIsLostOnNonsense(t *testing.T) {
	var m meter
	m.add(binary.BigEndian.AppendUint32([]byte{'Q'}, 3))
	if !m.lost || m.edge() {
		t.Error("a length of 3 was taken")
	}
	m.add([]byte{'Q', 0, 0, 0, 4})
	if m.edge() {
		t.Error("an edge was found again")
	}
}

func BenchmarkMeter(b *testing.B) {
	var chunk []byte
	for len(chunk) < 128<<10 {
		chunk = message(chunk, 'D', make([]byte, 66)...)
	}
	m := meter{ended: func(byte, byte) {}}
	b.SetBytes(int64(len(chunk)))
	for b.Loop() {
		m.add(chunk)
	}
}

func TestStrangers(t *testing.T) {
	s := newStrangers(8)
	left := map[string]int{}
	enter := func(from string, loopback bool) (*stranger, bool) {
		one := &stranger{from: from}
		one.leave = func() { left[from]++ }
		return one, s.enter(one, loopback)
	}
	for i := range 4 { // a quarter for one address, and no more
		if _, ok := enter("a", false); ok != (i < 2) {
			t.Errorf("a's connection %d: got %v", i, ok)
		}
	}
	for i := range 6 {
		if _, ok := enter("local", true); !ok {
			t.Errorf("local connection %d was refused", i)
		}
	}
	// Full: who comes next takes a place of the address with the most.
	b, ok := enter("b", false)
	if !ok || left["local"] != 1 || left["a"] != 0 {
		t.Errorf("got %v, left %v", ok, left)
	}
	s.remove(b)
	s.remove(b)
	if s.count != 7 || len(s.by["b"]) != 0 {
		t.Errorf("%d strangers, %v", s.count, s.by)
	}
}
