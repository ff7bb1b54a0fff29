package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/proto/syslog"
)

// TestAuditSyslog: a control plane forwards its organizations' chains, whole, and says in its metrics that it has.
func TestAuditSyslog(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "log") // a socket's path may not be long
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir) //nolint:errcheck // a throwaway
	socket := filepath.Join(dir, "log")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	got := map[uint64]string{}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer c.Close() //nolint:errcheck // it ends who reads
	wg.Go(func() {
		buf := make([]byte, 1<<20)
		for {
			n, err := c.Read(buf)
			if err != nil {
				return
			}
			head, line, _ := strings.Cut(string(buf[:n]), "] ")
			e, err := auditchain.Decode([]byte(line))
			if err != nil || !strings.HasPrefix(head, "<109>1 ") && !strings.HasPrefix(head, "<108>1 ") || !strings.Contains(head, " postern-controlplane ") {
				t.Errorf("%v: %q", err, buf[:n])
			}
			mu.Lock()
			got[e.Sequence] = line
			mu.Unlock()
		}
	})
	s := startServer(t, func(o *Options) { o.AuditSyslog = SyslogOptions{To: "unix://" + socket, Facility: "audit"} })
	for range 3 {
		s.newKey(t, s.token, 1)
	}
	api := posternv1connect.NewAuditServiceClient(as(s.token), s.url)
	list, err := api.ListAudit(t.Context(), connect.NewRequest(&posternv1.ListAuditRequest{From: 1, Limit: 100}))
	if err != nil || len(list.Msg.Entries) < 3 {
		t.Fatalf("%v, %v", list, err)
	}
	eventually(t, "the entries", func() error {
		mu.Lock()
		defer mu.Unlock()
		for i, line := range list.Msg.Entries {
			if !bytes.Equal(line, []byte(got[uint64(i+1)])) {
				return fmt.Errorf("entry %d is %q", i+1, got[uint64(i+1)])
			}
		}
		return nil
	})
	eventually(t, "the position", func() error {
		waiting, err := s.store.AuditWaiting(t.Context(), "unix://"+socket)
		if st := s.forwarder.Stats(); err != nil || len(waiting) > 0 || !st.Connected || !st.Oldest.IsZero() {
			return fmt.Errorf("%v wait, %+v, %w", waiting, st, err)
		}
		return nil
	})
	if needed, err := s.auditNeeded(t.Context(), "org_default"); err != nil || needed < 3 {
		t.Errorf("entries up to %d may be dropped, %v", needed, err)
	}
}

func TestSyslogOptions(t *testing.T) {
	for _, c := range []struct {
		o    SyslogOptions
		want string
	}{
		{SyslogOptions{}, ""},
		{SyslogOptions{Facility: "authpriv", MaxMessage: 8192}, ""},
		{SyslogOptions{To: "tls://logs", Files: syslog.Files{CA: "/ca", Cert: "/c", Key: "/k"}, MaxMessage: 1 << 20}, ""},
		{SyslogOptions{To: "logs"}, `--audit-syslog: "logs" is not a URL`},
		{SyslogOptions{To: "tcp://logs", Facility: "kern"}, `--audit-syslog-facility: "kern"`},
		{SyslogOptions{To: "tcp://logs", Files: syslog.Files{CA: "/ca"}}, "need --audit-syslog tls://"},
		{SyslogOptions{To: "tls://logs", Files: syslog.Files{Cert: "/c"}}, "belong together"},
		{SyslogOptions{To: "tls://logs", MaxMessage: 100}, "--audit-syslog-max-message is not between"},
		{SyslogOptions{Files: syslog.Files{CA: "/ca"}}, "mean nothing without --audit-syslog"},
	} {
		o := Options{Data: "x", LogLevel: "info", LogFormat: "text", AuditSyslog: c.o}
		if err := o.Validate(); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.o, err, c.want)
		}
	}
}
