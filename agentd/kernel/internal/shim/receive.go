package shim

import (
	"cmp"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/kernel/internal/journal"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxRequests bounds the requests that await a reply; the oldest is given up for a
	// new one.
	maxRequests = 4 * maxQueued
	// maxKeptHeader is up to which size a request's header is remembered as it came.
	maxKeptHeader = 2 << 10
	// graceTime is how long a reply may come after the kernel was idle again.
	graceTime = 2 * time.Second
	// maxUndone bounds the requests that have their reply, and of which the kernel did not
	// say yet that it is done with them; the oldest is forgotten for a new one.
	maxUndone = 256
)

// request is one that awaits its reply, and what the kernel said of it.
type request struct {
	journal.Request
	order uint64
	// queued: it waits in our queue.
	queued bool
	busy   bool
	idle   time.Time // when the kernel said that it is done with it
	count  int       // of execute_input
	failed map[string]any
	// lost: the kernel has answered what came after it on the same channel.
	lost time.Time
	// replying: the shim answers it at this moment.
	replying bool
}

// accept notes a client's message before it waits for the kernel.
func (s *Shim) accept(name string, h jupyter.Header, m *posternv1.KernelMessage) {
	if m.Channel == jupyter.Stdin {
		return // a reply itself
	}
	header := m.Header
	if len(header) > maxKeptHeader {
		header, _ = json.Marshal(h) //nolint:errchkjson // strings alone
	}
	s.mu.Lock()
	r := &request{
		Request: journal.Request{ID: h.ID, Client: name, Type: h.Type, Channel: m.Channel, Header: header, Generation: s.state.Generation, Epoch: s.state.Epoch},
		queued:  true,
	}
	s.requests[h.ID] = r
	s.order++
	r.order = s.order
	var old *request
	if len(s.requests) > maxRequests {
		for _, q := range s.requests {
			if old == nil || q.order < old.order {
				old = q
			}
		}
		delete(s.requests, old.ID)
	}
	s.mu.Unlock()
	if old != nil {
		s.journal.Answered(old.ID)
	}
	s.journal.Sent(r.Request)
}

// note notes that a message goes to the kernel now.
func (s *Shim) note(m *posternv1.KernelMessage, epoch uint64) {
	h, err := jupyter.ParseHeader(m.Header)
	if err != nil {
		return // it was checked
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.requests[h.ID]; r != nil {
		r.queued, r.Epoch, r.Generation = false, epoch, s.state.Generation
	}
	s.active = time.Now()
}

// hasRequests reports whether the kernel may be in the middle of something.
func (s *Shim) hasRequests() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.requests {
		if !r.queued && r.Channel == jupyter.Shell {
			return true
		}
	}
	return false
}

// hasUndone reports whether the kernel has yet to say that it is done with something it
// has answered.
func (s *Shim) hasUndone() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.undone {
		if r.busy && r.Channel == jupyter.Shell {
			return true
		}
	}
	return false
}

// received journals a message of the kernel.
func (s *Shim) received(l *link, m *posternv1.KernelMessage) error {
	h, err := jupyter.ParseHeader(m.Header)
	if err != nil {
		s.dropped(m.Channel, err)
		return nil
	}
	parent, err := jupyter.ParseHeader(m.ParentHeader)
	if err != nil {
		s.dropped(m.Channel, err)
		return nil
	}
	if strings.HasPrefix(parent.Session, ownPrefix) { // an earlier shim's, too
		s.ours(l, m, h)
		return nil
	}
	switch m.Channel {
	case jupyter.IOPub:
		out := s.clean(m, h.Type)
		s.heard(h, parent, m)
		for _, m := range out {
			if _, err = s.journal.Append("", m); err != nil {
				break
			}
		}
		return s.journaled(err)
	case jupyter.Stdin:
		name := s.ownerOf(parent)
		if name == "" {
			s.dropped(m.Channel, errors.New("a question to nobody"))
			return nil
		}
		for _, m := range s.clean(m, h.Type) {
			to := name
			if m.Channel == jupyter.IOPub {
				to = ""
			}
			if _, err = s.journal.Append(to, m); err != nil {
				break
			}
		}
		return s.journaled(err)
	default:
		name := s.ownerOf(parent)
		if name == "" {
			s.dropped(m.Channel, errors.New("a reply to nobody"))
			return nil
		}
		s.clean(m, h.Type)
		_, err = s.journal.Append(name, m)
		s.replied(parent.ID)
		return s.journaled(err)
	}
}

func (s *Shim) journaled(err error) error {
	if errors.Is(err, journal.ErrClosed) {
		return err
	}
	if err != nil {
		s.logger.Error("message of the kernel not kept", "err", err)
	}
	return nil
}

// ours takes what the kernel says about our own messages: nobody else is told.
func (s *Shim) ours(l *link, m *posternv1.KernelMessage, h jupyter.Header) {
	if m.Channel == jupyter.Control && h.Type == secretsReply {
		l.replied(m)
		return
	}
	p := l.probe.Load()
	if p == nil {
		return
	}
	switch m.Channel {
	case jupyter.IOPub:
		p.onceIOPub.Do(func() { close(p.iopub) })
	case jupyter.Shell:
		if h.Type == "kernel_info_reply" {
			p.onceShell.Do(func() { close(p.shell) })
			s.passed(l)
		}
	}
}

// ownerOf is the client whose message a message of the kernel answers; empty: nobody
// is known.
func (s *Shim) ownerOf(parent jupyter.Header) string {
	s.mu.Lock()
	r := s.requests[parent.ID]
	s.mu.Unlock()
	if r != nil {
		return r.Client
	}
	if _, known := s.journal.Confirmed(parent.Session); known && parent.Session != "" {
		return parent.Session
	}
	return ""
}

func (s *Shim) answered(id string) {
	s.mu.Lock()
	_, there := s.requests[id]
	delete(s.requests, id)
	s.mu.Unlock()
	if there {
		s.journal.Answered(id)
	}
}

// replied notes the kernel's reply to a request. A client waits for "idle", too, which
// comes on another channel: whoever ends the kernel in between says it; see undone.
func (s *Shim) replied(id string) {
	s.mu.Lock()
	if r := s.requests[id]; r != nil && r.idle.IsZero() {
		if len(s.undone) >= maxUndone {
			oldest := ""
			for id, q := range s.undone {
				if oldest == "" || q.order < s.undone[oldest].order {
					oldest = id
				}
			}
			delete(s.undone, oldest)
		}
		s.undone[id] = r
	}
	s.mu.Unlock()
	s.answered(id)
}

// idle says in the kernel's place that it is done with a request.
func (s *Shim) idle(r *request) error {
	m, err := jupyter.New(jupyter.IOPub, "status", s.self, map[string]string{"execution_state": "idle"})
	if err != nil {
		return nil //nolint:nilerr // of two strings one can always be made
	}
	m.ParentHeader = r.Header
	_, err = s.journal.Append("", m)
	return err
}

// heard takes from a message on iopub what it says about the kernel and its requests.
func (s *Shim) heard(h, parent jupyter.Header, m *posternv1.KernelMessage) {
	switch h.Type {
	case "status":
		var c struct {
			State string `json:"execution_state"`
		}
		if json.Unmarshal(m.Content, &c) == nil {
			s.status(c.State, parent)
		}
	case "execute_input":
		var c struct {
			Count int `json:"execution_count"`
		}
		if json.Unmarshal(m.Content, &c) == nil {
			s.mu.Lock()
			if r := s.requests[parent.ID]; r != nil {
				r.count = c.Count
			}
			s.mu.Unlock()
		}
	case "error":
		if len(m.Content) > 64<<10 {
			return
		}
		var c map[string]any
		if json.Unmarshal(m.Content, &c) == nil {
			s.mu.Lock()
			if r := s.requests[parent.ID]; r != nil {
				r.failed = c
			}
			s.mu.Unlock()
		}
	}
}

func (s *Shim) status(state string, parent jupyter.Header) {
	done := ""
	s.mu.Lock()
	s.active = time.Now()
	r := s.requests[parent.ID]
	if r == nil {
		if r = s.undone[parent.ID]; state == "idle" {
			delete(s.undone, parent.ID)
		}
	}
	onControl := r != nil && r.Channel == jupyter.Control
	switch {
	case r == nil:
	case state == "busy":
		r.busy = true
	case state == "idle":
		if r.idle = time.Now(); strings.HasPrefix(r.Type, "comm_") {
			done = parent.ID // nothing else answers it
		}
	}
	phase := s.phase
	settled := phase == posternv1.KernelState_KERNEL_STATE_IDLE || phase == posternv1.KernelState_KERNEL_STATE_BUSY
	s.mu.Unlock()
	if done != "" {
		s.answered(done)
	}
	if !settled || onControl {
		return // what is done on control says nothing about what shell does
	}
	switch state {
	case "busy":
		s.setPhase(posternv1.KernelState_KERNEL_STATE_BUSY, "")
	case "idle":
		s.setPhase(posternv1.KernelState_KERNEL_STATE_IDLE, "")
	}
}

// kernelReady: the kernel answers, or is known to be in the middle of a cell.
func (s *Shim) kernelReady(l *link) {
	s.mu.Lock()
	busy := s.busyLocked()
	s.mu.Unlock()
	if busy {
		s.setPhase(posternv1.KernelState_KERNEL_STATE_BUSY, "")
	} else {
		s.setPhase(posternv1.KernelState_KERNEL_STATE_IDLE, "")
	}
}

// passed: the kernel has answered our question on shell, which came after everything
// that earlier epochs sent there. What of that has no reply by now has lost it.
func (s *Shim) passed(l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.requests {
		if !r.queued && r.Epoch < l.epoch && r.lost.IsZero() && r.Channel == jupyter.Shell {
			r.lost = time.Now()
		}
	}
	for _, r := range s.undone {
		if r.Epoch < l.epoch && r.lost.IsZero() {
			r.lost = time.Now()
		}
	}
	if s.phase == posternv1.KernelState_KERNEL_STATE_BUSY && !s.busyLocked() {
		s.phase = posternv1.KernelState_KERNEL_STATE_IDLE
		close(s.changed)
		s.changed = make(chan struct{})
	}
}

// busyLocked reports whether the kernel has requests on shell that it is not done with.
func (s *Shim) busyLocked() bool {
	for _, r := range s.requests {
		if !r.queued && r.Channel == jupyter.Shell && r.idle.IsZero() && r.lost.IsZero() {
			return true
		}
	}
	return false
}

// watchRequests gives up waiting for replies that were lost.
func (s *Shim) watchRequests() {
	tick := time.NewTicker(graceTime / 4)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-s.ctx.Done():
			return
		}
		s.sweep(time.Now())
	}
}

// sweep answers requests whose replies were lost: sent in an earlier epoch, and the
// kernel is done with them, as it said itself (idle) or by answering what came later.
// The reply is made of what the kernel said on iopub. A request of this epoch that the
// kernel never answers although it was idle is forgotten alone: it has no reply.
func (s *Shim) sweep(now time.Time) {
	var lost, silent, undone []*request
	s.mu.Lock()
	epoch := s.state.Epoch
	if l := s.link; l != nil {
		epoch = l.epoch
	}
	for _, r := range s.requests {
		if r.queued {
			continue
		}
		done := !r.idle.IsZero() && now.Sub(r.idle) > graceTime
		switch {
		case r.Epoch < epoch && (done || !r.lost.IsZero() && now.Sub(r.lost) > graceTime):
			lost = append(lost, r)
		case done:
			silent = append(silent, r)
		}
	}
	for id, r := range s.undone {
		if !r.lost.IsZero() && now.Sub(r.lost) > graceTime {
			undone = append(undone, r)
			delete(s.undone, id)
		}
	}
	s.mu.Unlock()
	s.idleAll(undone)
	for _, r := range silent {
		s.answered(r.ID)
	}
	for _, r := range lost {
		s.reply(r, "its reply was lost when the kernel's connections were made anew (a checkpoint, a crash of its shim): whether it ran to its end is not known, its outputs were kept")
	}
}

// reply answers a request in the kernel's place. why stands in the reply if nothing is
// known of how it ended.
func (s *Shim) reply(r *request, why string) {
	s.mu.Lock()
	if s.requests[r.ID] != r || r.replying {
		s.mu.Unlock()
		return // answered meanwhile
	}
	r.replying = true
	idle, failed, count := !r.idle.IsZero(), r.failed, r.count
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		r.replying = false
	}()
	if r.Type == "" || !strings.HasSuffix(r.Type, "_request") {
		s.answered(r.ID) // a comm's message has no reply
		return
	}
	content := map[string]any{"status": "ok", "payload": []any{}, "user_expressions": map[string]any{}}
	switch {
	case failed != nil:
		content = failed
		content["status"] = "error"
	case !idle || count == 0: // without execute_input it may have been aborted, or have run silently
		content = map[string]any{"status": "error", "ename": "ReplyLost", "evalue": why, "traceback": []string{}}
	}
	if r.Type == "execute_request" {
		content["execution_count"] = count
	}
	m, err := jupyter.New(r.Channel, strings.TrimSuffix(r.Type, "_request")+"_reply", s.self, content)
	if err != nil {
		return
	}
	m.ParentHeader = r.Header
	m.Metadata = []byte(`{"postern":{"made_by":"shim"}}`)
	if _, err := s.journal.Append(r.Client, m); err != nil {
		return
	}
	if !idle {
		if err := s.idle(r); err != nil {
			return
		}
	}
	s.answered(r.ID)
}

// idleAll is idle for several, in the order in which they were sent.
func (s *Shim) idleAll(all []*request) {
	slices.SortFunc(all, func(a, b *request) int { return cmp.Compare(a.order, b.order) })
	for _, r := range all {
		if err := s.idle(r); err != nil {
			s.logger.Error("a request's end not kept", "err", err)
			return
		}
	}
}

// refuseAll answers everything that waits for a kernel that is no more.
func (s *Shim) refuseAll(why string) {
	s.mu.Lock()
	var all, undone []*request
	refused := map[string]struct{}{}
	for _, r := range s.requests {
		all = append(all, r)
		refused[r.ID] = struct{}{}
	}
	for _, r := range s.undone {
		undone = append(undone, r)
	}
	clear(s.undone)
	s.mu.Unlock()
	s.idleAll(undone)
	for _, r := range all {
		s.reply(r, why)
	}
	// Last: one that comes into a queue after this finds that it was answered. What was
	// accepted since is for the next kernel.
	for _, q := range s.queues {
		q.drop(func(m *posternv1.KernelMessage) bool {
			h, err := jupyter.ParseHeader(m.Header)
			if err != nil || m.Channel == jupyter.Stdin {
				return true
			}
			if _, was := refused[h.ID]; was {
				return true
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.requests[h.ID] == nil
		})
	}
}
