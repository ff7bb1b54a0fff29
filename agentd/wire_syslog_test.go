package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/proto/auditchain"
)

// A syslogSocket is /dev/log of a test: it takes the host's entries.
type syslogSocket struct {
	t    *testing.T
	path string

	mu  sync.Mutex
	got map[uint64]string
}

// listen takes entries until stop.
func (s *syslogSocket) listen() (stop func()) {
	s.t.Helper()
	os.Remove(s.path) //nolint:errcheck // it may not be there
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: s.path, Net: "unixgram"})
	if err != nil {
		s.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 1<<20)
		for {
			n, err := c.Read(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			head, line, _ := strings.Cut(string(buf[:n]), "] ")
			e, err := auditchain.Decode([]byte(line))
			if err != nil || !strings.HasPrefix(head, "<85>1 ") && !strings.HasPrefix(head, "<84>1 ") || !strings.Contains(head, " postern-agentd ") {
				s.t.Errorf("%v: %q", err, buf[:n])
			}
			s.mu.Lock()
			s.got[e.Sequence] = line
			s.mu.Unlock()
		}
	})
	return func() { c.Close(); wg.Wait() } //nolint:errcheck // it ends who reads
}

// through waits until it has the whole log as it is.
func (s *syslogSocket) through(l *lab) {
	s.t.Helper()
	s.until("all entries", func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, e := range l.entries() {
			if s.got[e.Sequence] != string(e.Encode()) {
				return fmt.Errorf("entry %d is %q", e.Sequence, s.got[e.Sequence])
			}
		}
		return nil
	})
}

func (s *syslogSocket) until(what string, f func() error) {
	s.t.Helper()
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			s.t.Fatalf("waiting for %s: %v", what, err)
		}
	}
}

// TestSyslog: a daemon forwards its whole log, keeps what it cannot forward, and goes on where it was after a
// restart.
func TestSyslog(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "log") // a socket's path may not be long
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir) //nolint:errcheck // a throwaway
	s := &syslogSocket{t: t, path: filepath.Join(dir, "log"), got: map[uint64]string{}}
	l := newLab(t, newTestControl(t), fmt.Sprintf("audit: {retention: 24h, syslog: {to: 'unix://%s'}}\nmetrics: {listen: 'unix:%s/metrics'}\n", s.path, dir))
	l.start()
	status := func(want func(control.Status) error) {
		t.Helper()
		s.until("the status", func() error {
			st, err := control.Ask(t.Context(), l.path("run"))
			if err != nil {
				return err
			}
			return want(st)
		})
	}
	status(func(st control.Status) error {
		if f := st.Audit.Syslog; f == nil || f.To != "unix://"+s.path || f.Through != 0 || !strings.Contains(f.Error, "no such file") {
			return fmt.Errorf("before the server: %+v", f)
		}
		return nil
	})
	if got := l.d.retirable(); got != 0 {
		t.Errorf("entries up to %d may be retired", got)
	}
	stop := s.listen()
	s.through(l)
	status(func(st control.Status) error {
		if f := st.Audit.Syslog; f == nil || f.Through != st.Audit.Sequence || f.Error != "" {
			return fmt.Errorf("with the server: %+v of %d", f, st.Audit.Sequence)
		}
		return nil
	})
	scrape := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "metrics"))
	}}}
	resp, err := scrape.Get("http://agentd/metrics")
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close() //nolint:errcheck // it was read
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"agentd_audit_syslog_up 1", "agentd_audit_syslog_waiting_entries 0", "agentd_audit_syslog_oldest_waiting_timestamp_seconds 0", "agentd_audit_syslog_messages_total ", "agentd_audit_syslog_failures_total ", "agentd_audit_first_entry 1"} {
		if !strings.Contains(string(body), "\n"+want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	l.stop() // host.stop is the last entry
	stop()
	s.mu.Lock()
	s.got = map[uint64]string{}
	s.mu.Unlock()
	defer s.listen()()
	l.start()
	s.until("the entries of the restart", func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		all := l.entries()
		for _, e := range all[len(all)-2:] {
			if s.got[e.Sequence] == "" {
				return fmt.Errorf("entry %d is missing", e.Sequence)
			}
		}
		if s.got[1] != "" {
			t.Error("the log came again from its beginning")
		}
		return nil
	})
	l.stop()
}
