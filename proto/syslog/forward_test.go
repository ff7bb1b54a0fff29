package syslog

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/postern-dev/postern/e2e/freeport"
	"github.com/postern-dev/postern/proto/auditchain"
)

// memoryChain is a chain in memory, and its position.
type memoryChain struct {
	mu    sync.Mutex
	lines [][]byte
	head  auditchain.Head
	at    auditchain.Head
	// retired is how many entries at the beginning are dropped.
	retired uint64
}

func (m *memoryChain) add(entries ...auditchain.Entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range entries {
		if e.Time.IsZero() {
			e.Time = time.Now()
		}
		m.head = e.Seal(m.head)
		m.lines = append(m.lines, e.Encode())
	}
}

func (m *memoryChain) After(_ context.Context, after uint64, limit int) ([][]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	page := m.lines[min(max(after, m.retired), uint64(len(m.lines))):]
	return page[:min(limit, len(page))], nil
}

func (m *memoryChain) Position(context.Context) (auditchain.Head, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.at, nil
}

func (m *memoryChain) Keep(_ context.Context, h auditchain.Head) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.at = h
	return nil
}

func entry(i int) auditchain.Entry {
	return auditchain.Entry{Action: "sql.run", Actor: "token ana", Organization: "org_default", Outcome: "done", Statement: fmt.Sprintf("select %d, 'ünïcode \"quoted\"'", i), Rows: uint64(i)}
}

func someEntries(n int) []auditchain.Entry {
	var all []auditchain.Entry
	for i := range n {
		all = append(all, entry(i))
	}
	return all
}

// forward runs a forwarder of chains to a target until the test, or stop, ends it.
func forward(t *testing.T, target Target, settle time.Duration, chains map[string]Chain, change func(*Config)) (f *Forwarder, stop func()) {
	t.Helper()
	facility, err := Facility("")
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{
		Target: target, Facility: facility, Hostname: "db-host", App: "postern-agentd", PID: 4711, Settle: settle,
		Chains: func(context.Context) (map[string]Chain, error) { return chains, nil },
	}
	if change != nil {
		change(&cfg)
	}
	f = New(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { f.Run(ctx) })
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return f, stop
}

func until(t *testing.T, what string, f func() error) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("waiting for %s: %v", what, err)
		}
	}
}

// delivered waits until a chain's position is its head.
func delivered(t *testing.T, m *memoryChain) {
	t.Helper()
	until(t, "the position", func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.at != m.head {
			return fmt.Errorf("it is %d of %d", m.at.Sequence, m.head.Sequence)
		}
		return nil
	})
}

// form is RFC 5424, section 6, as far as it is used.
var form = regexp.MustCompile(`^<([0-9]{1,3})>1 ([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z) ([!-~]{1,255}) ([!-~]{1,48}) ([!-~]{1,128}) ([!-~]{1,32}) \[meta sequenceId="([0-9]+)"\] (.*)$`)

// A server is a syslog server of the test: it takes octet-counted messages.
type server struct {
	net.Listener

	mu sync.Mutex
	// got are the entries by number, as often as they came; order those that came first, in their order.
	got   map[uint64]int
	order []uint64
	lines map[uint64]string
	bad   []string
}

func newServer(t *testing.T) *server {
	t.Helper()
	address, err := freeport.Address() // it is listened on again
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return &server{Listener: l, got: map[uint64]int{}, lines: map[uint64]string{}}
}

func (s *server) target() Target { return Target{"tcp", s.Addr().String()} }

// serve takes messages of a connection, most at most (0: all), and hangs up without a look at what else came.
func (s *server) serve(c net.Conn, most int) {
	defer c.Close() //nolint:errcheck // it was read
	r := bufio.NewReaderSize(c, 512)
	for n := 1; ; n++ {
		length, err := r.ReadString(' ')
		if err != nil {
			return
		}
		size, err := strconv.Atoi(strings.TrimSpace(length))
		if err != nil || size > 1<<20 {
			s.note("a length " + length)
			return
		}
		message := make([]byte, size)
		if _, err := io.ReadFull(r, message); err != nil {
			return
		}
		s.take(string(message))
		if n == most {
			return
		}
	}
}

func (s *server) note(bad string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bad = append(s.bad, bad)
}

func (s *server) take(message string) {
	m := form.FindStringSubmatch(message)
	if m == nil {
		s.note("no message of RFC 5424: " + message)
		return
	}
	n, err := strconv.ParseUint(m[7], 10, 64)
	if err != nil || m[1] != "85" || m[3] != "db-host" || m[4] != "postern-agentd" || m[5] != "4711" || m[6] != "sql.run" {
		s.note("other fields: " + message)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.got[n] == 0 {
		s.order = append(s.order, n)
	}
	s.got[n]++
	s.lines[n] = m[8]
}

// whole checks that all entries of a chain came, in their order and as they are.
func (s *server) whole(t *testing.T, m *memoryChain) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.bad) > 0 {
		t.Errorf("%d bad messages, the first: %s", len(s.bad), s.bad[0])
	}
	v := auditchain.NewVerifier(auditchain.Head{})
	for i, line := range m.lines {
		n := uint64(i + 1)
		if s.lines[n] != string(line) || i >= len(s.order) || s.order[i] != n {
			t.Fatalf("entry %d came as %q, %d times", n, s.lines[n], s.got[n])
		}
		if err := v.Add([]byte(s.lines[n])); err != nil {
			t.Fatal(err)
		}
	}
}

// TestNothingIsLost: a server that hangs up again and again with entries unread, and is away, gets all.
func TestNothingIsLost(t *testing.T) {
	s := newServer(t)
	addr := s.Addr().String()
	var serving sync.WaitGroup
	serving.Go(func() {
		for _, most := range []int{1, 7, 60, 600} {
			c, err := s.Accept()
			if err != nil {
				return
			}
			s.serve(c, most)
		}
		s.Close() //nolint:errcheck // away for a while
	})
	m := &memoryChain{}
	m.add(someEntries(1500)...)
	f, stop := forward(t, s.target(), 2*time.Second, map[string]Chain{"": m}, nil)
	serving.Wait()
	until(t, "a failure to be seen", func() error {
		if st := f.Stats(); st.Connected || st.Err == "" || st.Oldest.IsZero() || st.Failures < 4 {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	if m.at.Sequence != 0 {
		t.Errorf("entry %d counts as delivered", m.at.Sequence)
	}
	m.add(someEntries(10)...)
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	s.Listener = l
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { s.serve(c, 0) })
		}
	})
	defer serving.Wait()
	defer l.Close() //nolint:errcheck // it ends who accepts
	delivered(t, m)
	until(t, "the figures", func() error {
		if st := f.Stats(); !st.Connected || !st.Oldest.IsZero() || st.Err != "" || st.Sent < 1510 {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	s.whole(t, m)
	// Another one goes on where this one was: nothing comes again.
	stop()
	before := s.got[1500]
	m.add(entry(1))
	_, stop = forward(t, s.target(), 10*time.Millisecond, map[string]Chain{"": m}, nil)
	delivered(t, m)
	stop()
	s.mu.Lock()
	if s.got[1500] != before || s.got[1511] != 1 {
		t.Errorf("entry 1500 came %d times more, 1511 %d times", s.got[1500]-before, s.got[1511])
	}
	s.mu.Unlock()
}

// TestWhereItBegins: positions of another log, and retired entries.
func TestWhereItBegins(t *testing.T) {
	chain := func() *memoryChain {
		m := &memoryChain{}
		m.add(someEntries(5)...)
		return m
	}
	head := func(m *memoryChain, n int) auditchain.Head {
		e, err := auditchain.Decode(m.lines[n-1])
		if err != nil {
			t.Fatal(err)
		}
		h, err := auditchain.HeadOf(e)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	for name, c := range map[string]struct {
		change func(m *memoryChain)
		want   uint64
	}{
		"nothing yet":   {func(*memoryChain) {}, 0},
		"in the middle": {func(m *memoryChain) { m.at = head(m, 3) }, 3},
		"another log":   {func(m *memoryChain) { m.at = auditchain.Head{Sequence: 3} }, 0},
		"a shorter log": {func(m *memoryChain) { m.at = auditchain.Head{Sequence: 9} }, 0},
		"retired":       {func(m *memoryChain) { m.at = head(m, 3); m.retired = 3 }, 3},
	} {
		m := chain()
		c.change(m)
		at, err := begin(t.Context(), m)
		if err != nil || at.Sequence != c.want {
			t.Errorf("%s: begins after %d, %v, want %d", name, at.Sequence, err, c.want)
		}
	}
}

// TestOneLeads: who does not lead sends nothing and says nothing of what waits.
func TestOneLeads(t *testing.T) {
	s := newServer(t)
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := s.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { s.serve(c, 0) })
		}
	})
	defer serving.Wait()
	defer s.Close() //nolint:errcheck // it ends who accepts
	m := &memoryChain{}
	m.add(someEntries(3)...)
	var mu sync.Mutex
	leads, asked := false, 0
	f, stop := forward(t, s.target(), 10*time.Millisecond, map[string]Chain{"": m}, func(c *Config) {
		c.Leads = func() bool { mu.Lock(); defer mu.Unlock(); asked++; return leads }
	})
	defer stop()
	until(t, "to be asked", func() error {
		mu.Lock()
		defer mu.Unlock()
		if asked < 3 {
			return fmt.Errorf("asked %d times", asked)
		}
		return nil
	})
	if st := f.Stats(); st.Sent != 0 || st.Connected || !st.Oldest.IsZero() {
		t.Errorf("%+v", st)
	}
	mu.Lock()
	leads = true
	mu.Unlock()
	delivered(t, m)
	s.whole(t, m)
}

func TestMessages(t *testing.T) {
	c := &Config{Facility: 13, Hostname: "höst name", App: "postern-agentd", PID: 7}
	at := time.Date(2026, 11, 22, 18, 0, 0, 5e6, time.UTC)
	for _, step := range []struct {
		e    auditchain.Entry
		head string
	}{
		{auditchain.Entry{Time: at, Action: "host.start", Outcome: "done"}, `<109>1 2026-11-22T18:00:00.005Z h_st_name postern-agentd 7 host.start [meta sequenceId="1"] {"sequence":1,`},
		{auditchain.Entry{Time: at, Action: "sql.run", Outcome: "denied"}, `<108>1 2026-11-22T18:00:00.005Z h_st_name postern-agentd 7 sql.run [meta sequenceId="1"] {`},
		{auditchain.Entry{Time: at, Action: "a b\n]" + strings.Repeat("x", 40), Outcome: "failed"}, `<108>1 2026-11-22T18:00:00.005Z h_st_name postern-agentd 7 a_b_]` + strings.Repeat("x", 27) + ` [meta sequenceId="1"] {`},
	} {
		step.e.Seal(auditchain.Head{})
		got, err := c.format(step.e.Encode(), DefaultMessage)
		if err != nil || !strings.HasPrefix(string(got), step.head) || !bytes.HasSuffix(got, step.e.Encode()) {
			t.Errorf("got %s, %v, want %s…", got, err, step.head)
		}
	}
	e := auditchain.Entry{Time: at, Action: "x"}
	e.Seal(auditchain.Head{Sequence: maxSequenceID})
	if got, err := c.format(e.Encode(), DefaultMessage); err != nil || !strings.Contains(string(got), `[meta sequenceId="1"]`) {
		t.Errorf("after the largest: %s, %v", got, err)
	}
	if _, err := c.format([]byte("{}"), DefaultMessage); err == nil {
		t.Error("a line that is no entry passes")
	}
}

// TestLongMessages: whatever is in an entry, its message is no longer than it may be, and JSON.
func TestLongMessages(t *testing.T) {
	c := &Config{Hostname: strings.Repeat("h", 300), App: "postern-agentd", PID: 7}
	for name, text := range map[string]string{"letters": "x", "quotes": `"`, "controls": "\x01", "wide": "€", "line ends": "\n"} {
		long := strings.Repeat(text, 70_000/len(text))
		e := auditchain.Entry{Time: time.Now(), Action: "sql.run", Statement: long, Error: long[:6000], Actor: long[:999], Target: long[:999], Agent: long[:999], Source: long[:999], Remote: long[:999]}
		e.Seal(auditchain.Head{})
		for _, most := range []int{LeastMessage, DefaultMessage, mostDatagram} {
			got, err := c.format(e.Encode(), most)
			if err != nil || len(got) > most || !utf8.Valid(got) {
				t.Errorf("%s: %d bytes of %d, %v", name, len(got), most, err)
				continue
			}
			_, line, found := bytes.Cut(got, []byte("] "))
			if !found || !bytes.HasPrefix(line, []byte(`{"cut":true,"sequence":1,`)) || !bytes.Contains(line, []byte(`"hash":"`+e.Hash+`"`)) || bytes.ContainsRune(line, '\n') {
				t.Errorf("%s: %.300s", name, got)
			}
			if len(got) < most/3 && most == DefaultMessage {
				t.Errorf("%s: only %d bytes of %d are left", name, len(got), most)
			}
		}
	}
}

func TestParseTarget(t *testing.T) {
	for text, want := range map[string]Target{
		"unix:///dev/log":                    {"unixgram", "/dev/log"},
		"udp://logs":                         {"udp", "logs:514"},
		"tcp://10.0.0.1:1514/":               {"tcp", "10.0.0.1:1514"},
		"tls://logs.example.com":             {"tls", "logs.example.com:6514"},
		"tls://[2001:db8::1]:6515":           {"tls", "[2001:db8::1]:6515"},
		"/dev/log":                           {},
		"unix://dev/log":                     {},
		"unix://" + strings.Repeat("/a", 60): {},
		"tls://":                             {},
		"tls://logs:0":                       {},
		"tls://logs:99999":                   {},
		"tls://logs/path":                    {},
		"tls://logs?x=1":                     {},
		"tls://me:secret@logs":               {},
		"https://logs":                       {},
		"":                                   {},
	} {
		got, err := ParseTarget(text)
		if got != want || (err == nil) != (want != Target{}) {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
		if err != nil && (strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s: %v", text, err)
		}
		if err == nil {
			if again, err := ParseTarget(got.String()); err != nil || again != got {
				t.Errorf("%s: %+v, %v", got, again, err)
			}
		}
	}
	for name, want := range map[string]int{"": 10, "authpriv": 10, "audit": 13, "local7": 23, "kern": -1, "LOCAL0": -1} {
		if got, err := Facility(name); (err == nil) != (want >= 0) || err == nil && got != want {
			t.Errorf("%q: %d, %v", name, got, err)
		}
	}
}

func FuzzFormat(f *testing.F) {
	f.Add("sql.run", "select 1", "h", 2048)
	f.Add("\x00", strings.Repeat("\xff", 5000), "", 3000)
	f.Fuzz(func(t *testing.T, action, statement, host string, most int) {
		most = max(LeastMessage, min(most, MostMessage))
		e := auditchain.Entry{Time: time.Now(), Action: action, Statement: statement, Error: statement, Target: action}
		e.Seal(auditchain.Head{})
		if _, err := auditchain.Decode(e.Encode()); err != nil {
			return
		}
		c := &Config{Facility: 10, Hostname: host, App: "a"}
		got, err := c.format(e.Encode(), most)
		if err != nil || len(got) > most || !form.Match(got) {
			t.Fatalf("%d bytes, %v: %.500s", len(got), err, got)
		}
	})
}
