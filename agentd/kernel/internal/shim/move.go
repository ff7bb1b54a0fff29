package shim

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/agentd/atomicfile"
	"github.com/postern-dev/postern/agentd/kernel/internal/journal"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// waitingFile has the messages that wait for a kernel that is being moved: frames of 4
// bytes of length (big-endian) and a posternv1.KernelMessage.
const waitingFile = "waiting"

// askedFile is what is known of requests that were not answered, as JSON: see asked.
const askedFile = "asked"

// Move is why a kernel is held: it goes to another host, or comes from one.
type Move struct {
	ID string `json:"id"`
	// To is the agent that it goes to; empty: it comes here.
	To string `json:"to,omitempty"`
	// Ran: it had processes when it was held, and gets them back.
	Ran bool `json:"ran,omitempty"`
	// Sent: the other host may have all of it.
	Sent bool `json:"sent,omitempty"`
}

// asked is what a shim knows of a request beside what the journal has: with it the next
// one answers in the kernel's place if need be.
type asked struct {
	ID     string         `json:"id"`
	Busy   bool           `json:"busy,omitempty"`
	Idle   time.Time      `json:"idle,omitzero"`
	Count  int            `json:"count,omitempty"`
	Failed map[string]any `json:"failed,omitempty"`
}

var errMoving = proto.Errorf(proto.CodeUnavailable, "the kernel is being moved to another host: try again in a moment")

// Hold keeps a kernel from everybody: clients are sent away, and nothing but Let, Stop
// and the dumps and restores of this move is done to it. It is durable when it returns.
// For the same move it may be repeated.
func (s *Shim) Hold(m Move) error {
	s.life.Lock()
	defer s.life.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	s.mu.Lock()
	now := s.state.Move
	if now != nil && now.ID != m.ID {
		s.mu.Unlock()
		return errMoving
	}
	s.state.Move = &m
	s.mu.Unlock()
	if err := s.saveState(); err != nil {
		s.mu.Lock()
		s.state.Move = now
		s.mu.Unlock()
		return err
	}
	s.mu.Lock()
	for _, c := range s.clients {
		c.cancel(errMoving)
	}
	s.mu.Unlock()
	s.signal()
	return nil
}

// Pack makes the directory of a held, suspended kernel complete: the journal is on the
// disk, and so are the messages that wait. sent is noted as Move.Sent, durably.
func (s *Shim) Pack(ctx context.Context, id string, sent bool) error {
	s.life.Lock()
	defer s.life.Unlock()
	s.mu.Lock()
	m, suspended := s.state.Move, s.state.Suspended
	s.mu.Unlock()
	switch {
	case m == nil || m.ID != id:
		return proto.Errorf(proto.CodeInvalid, "the kernel is not held by move %.64s", id)
	case !suspended:
		return proto.Errorf(proto.CodeInvalid, "the kernel is not suspended")
	}
	for gone := false; !gone; { // clients that were sent away may still put a message
		s.mu.Lock()
		gone = len(s.clients) == 0
		changed := s.changed
		s.mu.Unlock()
		if gone {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	var b []byte
	for _, q := range s.queues {
		for _, message := range q.all() {
			text, err := gproto.Marshal(message)
			if err != nil {
				return err
			}
			b = append(binary.BigEndian.AppendUint32(b, uint32(len(text))), text...)
		}
	}
	var files atomicfile.FS
	if err := files.Write(filepath.Join(s.dir, waitingFile), b, 0o600); err != nil {
		return err
	}
	if err := s.writeAsked(); err != nil {
		return err
	}
	if err := s.journal.Sync(); err != nil {
		return err
	}
	if !sent {
		return nil
	}
	s.mu.Lock()
	after := *m
	after.Sent = true
	s.state.Move = &after
	s.mu.Unlock()
	defer s.signal() // whoever decides what becomes of the kernel must know
	return s.saveState()
}

// Let ends Hold: the kernel is everybody's again. committed notes that a kernel that came
// here is here for good. Of another move it is content.
func (s *Shim) Let(id string, committed bool) error {
	s.life.Lock()
	defer s.life.Unlock()
	s.mu.Lock()
	m := s.state.Move
	s.mu.Unlock()
	if m == nil || m.ID != id {
		return nil
	}
	s.mu.Lock()
	s.state.Move = nil
	if committed {
		s.state.Moved = id
	}
	s.mu.Unlock()
	if err := s.saveState(); err != nil {
		s.mu.Lock()
		s.state.Move = m
		s.mu.Unlock()
		return err
	}
	for _, name := range []string{waitingFile, askedFile} {
		if err := os.Remove(filepath.Join(s.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			s.logger.Warn("messages that waited during a move not removed", "err", err)
		}
	}
	s.signal()
	return nil
}

// writeAsked writes what is known of requests.
func (s *Shim) writeAsked() error {
	s.mu.Lock()
	all := []asked{}
	for _, r := range s.requests {
		if r.heard() {
			all = append(all, asked{ID: r.ID, Busy: r.busy, Idle: r.idle, Count: r.count, Failed: r.failed})
		}
	}
	s.mu.Unlock()
	text, err := json.Marshal(all)
	if err != nil {
		return err
	}
	var files atomicfile.FS
	return files.Write(filepath.Join(s.dir, askedFile), text, 0o600)
}

// heard reports whether the kernel said something of a request.
func (r *request) heard() bool { return r.busy || r.count > 0 || r.failed != nil || !r.idle.IsZero() }

// readAsked takes what the shim before knew of requests.
func (s *Shim) readAsked() error {
	b, err := os.ReadFile(filepath.Join(s.dir, askedFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var all []asked
	if err := json.Unmarshal(b, &all); err != nil {
		return err
	}
	s.mu.Lock()
	for _, a := range all {
		if r := s.requests[a.ID]; r != nil {
			r.busy, r.idle, r.count, r.failed = a.Busy, a.Idle, a.Count, a.Failed
		}
	}
	s.mu.Unlock()
	if s.state.Move != nil {
		return nil // it may go away again
	}
	return os.Remove(filepath.Join(s.dir, askedFile))
}

// heldLocked refuses what is not of the move that holds the kernel. The caller has mu.
func (s *Shim) heldLocked(move string) error {
	if m := s.state.Move; m != nil && m.ID != move {
		return errMoving
	}
	return nil
}

func (s *Shim) held(move string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.heldLocked(move)
}

// maxWaiting bounds the file in bytes: three full queues.
const maxWaiting = 3 * (maxQueuedBytes + 65<<20)

// readWaiting gives the kernel what waited for it when it was moved.
func (s *Shim) readWaiting() error {
	path := filepath.Join(s.dir, waitingFile)
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // it is only read
	r := &io.LimitedReader{R: f, N: maxWaiting}
	for {
		var head [4]byte
		if _, err := io.ReadFull(r, head[:]); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		n := int64(binary.BigEndian.Uint32(head[:]))
		if n > r.N {
			return errors.New("messages that waited during a move: the file is cut")
		}
		text := make([]byte, n)
		if _, err := io.ReadFull(r, text); err != nil {
			return err
		}
		m := &posternv1.KernelMessage{}
		if err := gproto.Unmarshal(text, m); err != nil {
			return err
		}
		q := s.queues[m.Channel]
		h, err := jupyter.Check(m)
		if err != nil || q == nil || len(h.ID) > maxID {
			return errors.New("messages that waited during a move: one is malformed")
		}
		s.fresh(h.ID)
		s.mu.Lock()
		if r := s.requests[h.ID]; r != nil {
			r.queued = true
		}
		s.mu.Unlock()
		q.add(m)
	}
	if s.state.Move != nil {
		return nil // it may go away again
	}
	return os.Remove(path)
}

// ReadSaved reads what Dumped.Kernel was.
func ReadSaved(kernel json.RawMessage) (Saved, error) {
	var saved Saved
	if err := json.Unmarshal(kernel, &saved); err != nil || saved.Sandbox == nil {
		return Saved{}, errors.Join(errors.New("what was saved of the kernel can't be read"), err)
	}
	return saved, nil
}

// StateForArrival is the shim.json of a kernel that comes from another host: suspended,
// and held by its move. spec is what it is here.
func StateForArrival(saved Saved, spec Spec, checkpoint string, m Move) State {
	box := *saved.Sandbox
	own := spec.Sandbox
	box.ID, box.UID, box.GID, box.Limits, box.Network, box.Binary = own.ID, own.UID, own.GID, own.Limits, own.Network, own.Binary
	box.StateDir, box.RunDir, box.PrivateDir, box.LogFile = own.StateDir, own.RunDir, own.PrivateDir, own.LogFile
	return State{Generation: saved.Generation, Epoch: saved.Epoch, Started: spec.Created, Suspended: true, Checkpoint: checkpoint, Key: saved.Key, Sandbox: &box, Move: &m}
}

// JournalFiles are the names of a journal's files in a kernel's directory, in an order in
// which they can be read while nothing is appended.
func JournalFiles(dir string) ([]string, error) {
	names, err := journal.Files(filepath.Join(dir, journalDir))
	for i, name := range names {
		names[i] = filepath.Join(journalDir, name)
	}
	return names, err
}

// Files are the names of the files beside the journal that Pack writes.
var Files = []string{waitingFile, askedFile}

type packOrder struct {
	ID   string `json:"id"`
	Sent bool   `json:"sent,omitempty"`
}

type letOrder struct {
	ID        string `json:"id"`
	Committed bool   `json:"committed,omitempty"`
}

// serveMoves adds the paths of moves.
func (s *Shim) serveMoves(mux *http.ServeMux) {
	handle(s, mux, "/v1/hold", func(_ context.Context, m Move) (any, error) { return struct{}{}, s.Hold(m) })
	handle(s, mux, "/v1/pack", func(ctx context.Context, o packOrder) (any, error) {
		ctx, cancel := context.WithTimeout(ctx, startTime)
		defer cancel()
		return struct{}{}, s.Pack(ctx, o.ID, o.Sent)
	})
	handle(s, mux, "/v1/let", func(_ context.Context, o letOrder) (any, error) { return struct{}{}, s.Let(o.ID, o.Committed) })
}

// Hold, Pack and Let are the shim's; see there.
func (a *Agent) Hold(ctx context.Context, m Move) error { return a.order(ctx, "/v1/hold", m, nil) }

// Pack makes a held kernel's directory complete.
func (a *Agent) Pack(ctx context.Context, id string, sent bool) error {
	return a.order(ctx, "/v1/pack", packOrder{id, sent}, nil)
}

// Let ends Hold.
func (a *Agent) Let(ctx context.Context, id string, committed bool) error {
	return a.order(ctx, "/v1/let", letOrder{id, committed}, nil)
}
