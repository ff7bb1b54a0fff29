package shim

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/agentd/kernel/internal/journal"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// lone is a shim without a kernel: its books and its journal alone.
func lone(t *testing.T) *Shim {
	t.Helper()
	j, _, err := journal.Open(journal.Config{Dir: t.TempDir(), MaxBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
	s := &Shim{
		logger: slog.New(slog.DiscardHandler), self: ownPrefix + "x", journal: j, queues: map[string]*queue{}, clients: map[string]*client{},
		known: map[string]struct{}{}, requests: map[string]*request{}, undone: map[string]*request{}, changed: make(chan struct{}),
	}
	for _, name := range []string{jupyter.Shell, jupyter.Control, jupyter.Stdin} {
		s.queues[name] = newQueue()
	}
	return s
}

// askedFor is a request of a client that the kernel has.
func (s *Shim) askedFor(t *testing.T) (header []byte) {
	t.Helper()
	m, err := jupyter.New(jupyter.Shell, "execute_request", "client", map[string]string{"code": "1"})
	if err != nil {
		t.Fatal(err)
	}
	h, err := jupyter.ParseHeader(m.Header)
	if err != nil {
		t.Fatal(err)
	}
	s.accept("client", h, m)
	s.note(m, 1)
	return m.Header
}

// says is what the kernel says about a request.
func (s *Shim) says(t *testing.T, parent []byte, channel, kind string, content any) {
	t.Helper()
	m, err := jupyter.New(channel, kind, "kernel", content)
	if err != nil {
		t.Fatal(err)
	}
	m.ParentHeader = parent
	if err := s.received(nil, m); err != nil {
		t.Fatal(err)
	}
}

// told is what the client gets, in short.
func (s *Shim) told(t *testing.T) []string {
	t.Helper()
	r := s.journal.Reader("client", 0)
	defer r.Close() //nolint:errcheck // it was read
	var all []string
	for {
		record, err := r.Try()
		if err != nil {
			t.Fatal(err)
		}
		if record == nil {
			return all
		}
		var b appender
		if _, err := record.WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		m := &posternv1.KernelMessage{}
		if err := proto.Unmarshal(b.b, m); err != nil {
			t.Fatal(err)
		}
		h, err := jupyter.ParseHeader(m.Header)
		if err != nil {
			t.Fatal(err)
		}
		parent, err := jupyter.ParseHeader(m.ParentHeader)
		if err != nil {
			t.Fatal(err)
		}
		if parent.Type != "execute_request" && string(m.Content) != `{"execution_state":"dead"}` {
			t.Errorf("%s is about %q", h.Type, parent.Type)
		}
		all = append(all, fmt.Sprintf("%s %s", h.Type, m.Content))
	}
}

// A kernel that ends between its reply and "idle" leaves nobody waiting for that, and
// what was said is not said again.
func TestEndBetweenReplyAndIdle(t *testing.T) {
	const (
		busy = `status {"execution_state":"busy"}`
		idle = `status {"execution_state":"idle"}`
		ok   = `execute_reply {"status":"ok"}`
	)
	status := func(state string) func(*Shim, []byte) {
		return func(s *Shim, parent []byte) {
			s.says(t, parent, jupyter.IOPub, "status", map[string]string{"execution_state": state})
		}
	}
	reply := func(s *Shim, parent []byte) {
		s.says(t, parent, jupyter.Shell, "execute_reply", map[string]string{"status": "ok"})
	}
	gone := func(s *Shim, _ []byte) { s.refuseAll("gone") }
	// anew: its connections were made anew, and it answers on the new ones.
	anew := func(s *Shim, _ []byte) {
		s.passed(&link{s: s, epoch: 2})
		s.sweep(time.Now().Add(2 * graceTime))
	}
	for name, test := range map[string]struct {
		steps []func(*Shim, []byte)
		want  []string
	}{
		"before idle":            {[]func(*Shim, []byte){status("busy"), reply, gone, gone}, []string{busy, ok, idle}},
		"before anything":        {[]func(*Shim, []byte){reply, gone}, []string{ok, idle}},
		"after idle":             {[]func(*Shim, []byte){status("busy"), reply, status("idle"), gone, anew}, []string{busy, ok, idle}},
		"reply last":             {[]func(*Shim, []byte){status("busy"), status("idle"), reply, gone}, []string{busy, idle, ok}},
		"connections anew":       {[]func(*Shim, []byte){status("busy"), reply, anew, anew, gone}, []string{busy, ok, idle}},
		"heard on the new ones":  {[]func(*Shim, []byte){reply, status("idle"), anew}, []string{ok, idle}},
		"nothing but time since": {[]func(*Shim, []byte){reply, func(s *Shim, _ []byte) { s.sweep(time.Now().Add(time.Hour)) }, status("idle")}, []string{ok, idle}},
	} {
		t.Run(name, func(t *testing.T) {
			s := lone(t)
			parent := s.askedFor(t)
			for _, step := range test.steps {
				step(s, parent)
			}
			if got := s.told(t); !slices.Equal(got, test.want) {
				t.Errorf("told %q, want %q", got, test.want)
			}
			if len(s.requests)+len(s.undone) != 0 {
				t.Errorf("remembered: %v, %v", s.requests, s.undone)
			}
		})
	}
	s := lone(t)
	for range maxUndone + 10 {
		parent := s.askedFor(t)
		reply(s, parent)
	}
	if len(s.undone) != maxUndone {
		t.Errorf("%d are remembered", len(s.undone))
	}
}

// What was refused while it was put into the queue is not run by the next kernel, and
// what came after that is.
func TestQueueAfterClear(t *testing.T) {
	q := newQueue()
	put := func(code string) *posternv1.KernelMessage {
		m := &posternv1.KernelMessage{Content: []byte(code)}
		if err := q.put(context.Background(), m); err != nil {
			t.Fatal(err)
		}
		return m
	}
	first := put("first")
	q.drop(func(*posternv1.KernelMessage) bool { return true }) // it was being sent
	second, third, fourth := put("second"), put("third"), put("fourth")
	q.done(first, nil, false)
	if got := q.all(); !slices.Equal(got, []*posternv1.KernelMessage{second, third, fourth}) {
		t.Errorf("there are %v", got)
	}
	q.remove(third)
	q.remove(first)
	q.done(second, nil, false)
	if got := q.all(); !slices.Equal(got, []*posternv1.KernelMessage{fourth}) {
		t.Errorf("there are %v", got)
	}
	q.remove(fourth)
	if q.bytes != 0 {
		t.Errorf("%d bytes", q.bytes)
	}
}

// A kernel that dies while a client's message waits for room: it is answered once, and
// does not wait for the next kernel.
func TestMessageAtDeath(t *testing.T) {
	for _, dies := range []bool{true, false} {
		s := lone(t)
		s.dir = t.TempDir()
		q := s.queues[jupyter.Shell]
		for range maxQueued {
			q.add(&posternv1.KernelMessage{Channel: jupyter.Shell})
		}
		m, err := jupyter.New(jupyter.Shell, "execute_request", "client", map[string]string{"code": "1"})
		if err != nil {
			t.Fatal(err)
		}
		taken := make(chan error)
		go func() { taken <- s.fromMessage(context.Background(), &client{name: "client"}, m) }()
		waitFor(t, "the message", func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return len(s.requests) == 1
		})
		if dies {
			if err := s.died(nil, "of a test"); err != nil {
				t.Fatal(err)
			}
		} else {
			s.refuseAll("the kernel was restarted")
		}
		if err := <-taken; err != nil {
			t.Fatal(err)
		}
		replies := 0
		for _, text := range s.told(t) {
			if strings.HasPrefix(text, "execute_reply") {
				replies++
			}
		}
		if n := q.len(); replies != 1 || n != 0 || q.bytes != 0 || len(s.requests) != 0 {
			t.Errorf("%d replies, %d wait (%d bytes), %d requests", replies, n, q.bytes, len(s.requests))
		}
	}
}
