package shim

import (
	"bytes"
	"encoding/json"
	"sync"

	"github.com/postern-dev/postern/agentd/kernel/internal/redact"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// cleaner takes secrets out of what the kernel says, before anybody but the kernel has
// seen it. What may be the beginning of a value at the end of printed text waits for what
// is printed next on the same stream, and goes out before anything else does.
type cleaner struct {
	mu      sync.Mutex
	streams [2]heldStream // stdout, stderr
}

type heldStream struct {
	redact.Stream
	parent []byte // of the message that it is the end of
}

var streamNames = [2]string{"stdout", "stderr"}

// clean returns the messages to journal in the place of m, in order; m may be changed.
func (s *Shim) clean(m *posternv1.KernelMessage, kind string) []*posternv1.KernelMessage {
	set := s.secrets.redactor()
	c := &s.cleaner
	c.mu.Lock()
	defer c.mu.Unlock()
	if m.Channel == jupyter.IOPub && kind == "stream" {
		if out, ok := s.cleanStreamLocked(set, m); ok {
			return out
		}
	}
	var out []*posternv1.KernelMessage
	if m.Channel == jupyter.IOPub || m.Channel == jupyter.Stdin {
		out = s.flushLocked()
	}
	if set != nil {
		m.Content, m.Metadata = set.JSON(m.Content), set.JSON(m.Metadata)
		for i := range m.Buffers {
			m.Buffers[i] = set.Bytes(m.Buffers[i])
		}
	}
	return append(out, m)
}

func (s *Shim) cleanStreamLocked(set *redact.Set, m *posternv1.KernelMessage) (out []*posternv1.KernelMessage, ok bool) {
	c := &s.cleaner
	if set == nil && c.streams[0].Empty() && c.streams[1].Empty() {
		return []*posternv1.KernelMessage{m}, true
	}
	var content struct {
		Name string `json:"name"`
		Text string `json:"text"`
	}
	if json.Unmarshal(m.Content, &content) != nil || content.Name != streamNames[0] && content.Name != streamNames[1] {
		return nil, false
	}
	h := &c.streams[0]
	if content.Name == streamNames[1] {
		h = &c.streams[1]
	}
	if !h.Empty() && !sameParent(h.parent, m.ParentHeader) {
		out = s.flushLocked()
	}
	text := h.Add(set, content.Text)
	h.parent = m.ParentHeader
	switch {
	case text == content.Text:
	case text == "":
		return out, true
	default:
		raw, err := json.Marshal(map[string]string{"name": content.Name, "text": text})
		if err != nil {
			return nil, false
		}
		m.Content = raw
	}
	if set != nil {
		m.Metadata = set.JSON(m.Metadata)
	}
	return append(out, m), true
}

// sameParent reports whether two messages answer the same request.
func sameParent(a, b []byte) bool {
	if bytes.Equal(a, b) { // a thread's, which answers nothing
		return true
	}
	x, err := jupyter.ParseHeader(a)
	if err != nil {
		return false
	}
	y, err := jupyter.ParseHeader(b)
	return err == nil && x.ID == y.ID
}

// flushLocked makes messages of what was held back.
func (s *Shim) flushLocked() (out []*posternv1.KernelMessage) {
	for i := range s.cleaner.streams {
		h := &s.cleaner.streams[i]
		if text := h.Flush(); text != "" {
			m, err := jupyter.New(jupyter.IOPub, "stream", s.self, map[string]string{"name": streamNames[i], "text": text})
			if err != nil {
				s.logger.Error("held text not passed on", "err", err)
				continue
			}
			m.ParentHeader = h.parent
			out = append(out, m)
		}
	}
	return out
}

// flushHeld journals what was held back: the kernel says nothing more.
func (s *Shim) flushHeld() {
	s.cleaner.mu.Lock()
	out := s.flushLocked()
	s.cleaner.mu.Unlock()
	for _, m := range out {
		if _, err := s.journal.Append("", m); err != nil {
			s.logger.Error("held text not kept", "err", err)
		}
	}
}
