package shim

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/kernel/internal/redact"
	"github.com/postern-dev/postern/agentd/kernel/internal/runsock"
	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// secretsSocket is in a kernel's run directory while secrets are handed over.
	secretsSocket = "secrets.sock"
	// secretsRequest and secretsReply are the types of messages on control that the
	// kernel's module postern understands. None has a value.
	secretsRequest, secretsReply = "postern_secrets_request", "postern_secrets_reply"
	// secretsTime bounds one try to hand secrets over, or to have them erased.
	secretsTime = 5 * time.Second
	// secretsFirst bounds the wait for them before clients' messages go to a kernel.
	secretsFirst = 2 * time.Second
	// secretsPause is between two tries.
	secretsPause = time.Second
)

// Secret is a variable of the kernel's environment.
type Secret struct {
	Name  string `json:"name"`
	Value []byte `json:"value"`
	// FromHost: the host read it itself.
	FromHost bool `json:"from_host,omitempty"`
}

// Secrets is all that a kernel is to have, and what it had before: that may be in its
// memory still, so it is kept out of outputs, too.
type Secrets struct {
	Current []Secret `json:"current,omitempty"`
	Old     []Secret `json:"old,omitempty"`
}

// String hides the values.
func (Secrets) String() string { return "redacted" }

// GoString hides the values.
func (Secrets) GoString() string { return "redacted" }

// String hides the value.
func (Secret) String() string { return "redacted" }

// GoString hides the value.
func (Secret) GoString() string { return "redacted" }

// Put is what came of SetSecrets.
type Put struct {
	// Waiting: the kernel runs and has not taken them yet. Later: it does not run.
	Waiting bool `json:"waiting,omitempty"`
	Later   bool `json:"later,omitempty"`
}

// keeper holds a kernel's secrets. They are in this process's memory alone.
type keeper struct {
	// give lets one hand over at a time.
	give sync.Mutex

	// mu guards the following.
	mu  sync.Mutex
	all Secrets
	// want is raised by each change, have is the want that the kernel has; 0: none.
	want, have uint64
	// paused: the kernel erased what it had, for a checkpoint, and is given nothing until
	// it is connected again.
	paused  bool
	changed chan struct{} // closed when any of this changes; nil: nobody waits
	set     *redact.Set
}

func (k *keeper) changedLocked() {
	if k.changed != nil {
		close(k.changed)
		k.changed = nil
	}
}

func (k *keeper) put(all Secrets) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.all = all
	k.want++
	var values []redact.Value
	for _, s := range slices.Concat(all.Current, all.Old) {
		values = append(values, redact.Value{Name: s.Name, Value: s.Value})
	}
	k.set = redact.New(values)
	k.changedLocked()
}

// due reports whether the kernel is to be given something, and when that changes.
func (k *keeper) due() (bool, <-chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.changed == nil {
		k.changed = make(chan struct{})
	}
	return k.want != k.have && !k.paused, k.changed
}

// forget: it is not known what the kernel's processes have.
func (k *keeper) forget(paused bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.have, k.paused = 0, paused
	k.changedLocked()
}

// holds reports whether the kernel may have secrets in its memory that it was given.
func (k *keeper) holds() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.all.Current)+len(k.all.Old) > 0
}

func (k *keeper) redactor() *redact.Set {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.set
}

// SetSecrets says all secrets that the kernel is to have from now on, and gives them to
// it. From its return on no output of the kernel has a value of them.
func (s *Shim) SetSecrets(ctx context.Context, all Secrets) (Put, error) {
	protect()
	s.secrets.put(all)
	s.mu.Lock()
	l, box := s.link, s.box
	s.mu.Unlock()
	if box == nil {
		return Put{Later: true}, nil
	}
	if l == nil || !l.connected() {
		return Put{Waiting: true}, nil
	}
	if err := l.bring(ctx); err != nil {
		s.logger.Warn("kernel has not taken its secrets yet", "err", err)
		return Put{Waiting: true}, nil
	}
	return Put{}, nil
}

// protect keeps this process's memory out of cores and from other processes.
func protect() { _ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) }

func (l *link) connected() bool {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	return l.conns != nil
}

// bringFirst gives the kernel its secrets before clients' messages, and keeps trying in
// the background if it does not take them.
func (l *link) bringFirst(wg *sync.WaitGroup, done <-chan struct{}) {
	if due, _ := l.s.secrets.due(); due {
		ctx, cancel := context.WithTimeout(l.ctx, secretsFirst)
		err := l.bring(ctx)
		cancel()
		if err != nil && l.ctx.Err() == nil {
			l.s.logger.Warn("kernel has not taken its secrets yet", "err", err)
		}
	}
	wg.Go(func() {
		for {
			due, changed := l.s.secrets.due()
			var again <-chan time.Time // nil: there is nothing to do
			timer := time.NewTimer(secretsPause)
			if due {
				again = timer.C
			}
			select {
			case <-done:
			case <-l.ctx.Done():
			case <-changed:
				timer.Stop()
				continue // who changed them gives them; if in vain, we do
			case <-again:
			}
			timer.Stop()
			select {
			case <-done:
				return
			default:
			}
			if l.ctx.Err() != nil {
				return
			}
			if err := l.bring(l.ctx); err != nil && l.ctx.Err() == nil {
				l.s.logger.Debug("kernel has not taken its secrets yet", "err", err)
			}
		}
	})
}

// bring gives the kernel all that it is to have.
func (l *link) bring(ctx context.Context) error {
	k := &l.s.secrets
	k.give.Lock()
	defer k.give.Unlock()
	k.mu.Lock()
	want, current, same, paused := k.want, k.all.Current, k.want == k.have, k.paused
	k.mu.Unlock()
	switch {
	case same:
		return nil
	case paused:
		return errors.New("the kernel is being checkpointed")
	}
	ctx, cancel := context.WithTimeout(ctx, secretsTime)
	defer cancel()
	stop := context.AfterFunc(l.ctx, cancel)
	defer stop()
	l.s.mu.Lock()
	box := l.s.spec.Sandbox
	l.s.mu.Unlock()
	listener, err := runsock.Listen(box.RunDir, secretsSocket, box.UID)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer func() {
		_ = listener.Close()
		wg.Wait()
		if err := runsock.Remove(box.RunDir, secretsSocket); err != nil {
			l.s.logger.Warn("socket for secrets not removed", "err", err)
		}
	}()
	wg.Go(func() { l.hand(ctx, listener, box.UID, current) })
	if err := l.ask(ctx, map[string]string{"op": "fetch", "path": sandbox.RunInside + "/" + secretsSocket}); err != nil {
		return err
	}
	k.mu.Lock()
	k.have = want
	k.mu.Unlock()
	return nil
}

// hand gives secrets to the first process of the kernel's user that connects: numbers are
// big-endian; the length of what follows (4 bytes), then for each secret the length of its
// name (2), the name, the length of the value (4), the value.
func (l *link) hand(ctx context.Context, listener *net.UnixListener, uid uint32, all []Secret) {
	deadline, _ := ctx.Deadline()
	_ = listener.SetDeadline(deadline)
	for {
		conn, err := listener.AcceptUnix()
		if err != nil {
			return // nobody came: ask says so
		}
		peer, err := runsock.PeerUID(conn)
		if err != nil || peer != uid {
			_ = conn.Close()
			continue
		}
		_ = conn.SetDeadline(deadline)
		text := make([]byte, 4, 4+sizeOf(all))
		for _, s := range all {
			text = append(binary.BigEndian.AppendUint16(text, uint16(len(s.Name))), s.Name...)
			text = append(binary.BigEndian.AppendUint32(text, uint32(len(s.Value))), s.Value...)
		}
		binary.BigEndian.PutUint32(text, uint32(len(text)-4))
		_, err = conn.Write(text)
		clear(text)
		_ = conn.Close()
		if err == nil {
			return
		}
	}
}

func sizeOf(all []Secret) int {
	n := 0
	for _, s := range all {
		n += 6 + len(s.Name) + len(s.Value)
	}
	return n
}

// ask sends a request about secrets on control and waits for the kernel's word.
func (l *link) ask(ctx context.Context, content any) error {
	m, err := jupyter.New(jupyter.Control, secretsRequest, l.s.self, content)
	if err != nil {
		return err
	}
	h, err := jupyter.ParseHeader(m.Header)
	if err != nil {
		return err
	}
	answer := make(chan []byte, 1)
	l.s.mu.Lock()
	conn := l.conns[jupyter.Control]
	if l.asked == nil {
		l.asked = map[string]chan []byte{}
	}
	l.asked[h.ID] = answer
	l.s.mu.Unlock()
	defer func() {
		l.s.mu.Lock()
		delete(l.asked, h.ID)
		l.s.mu.Unlock()
	}()
	if conn == nil {
		return errors.New("the kernel is not connected at present")
	}
	if err := conn.Send(l.signer.Frames(nil, m)); err != nil {
		return err
	}
	select {
	case text := <-answer:
		var said struct {
			Status string `json:"status"`
			Reason string `json:"reason"`
		}
		if err := json.Unmarshal(text, &said); err != nil || said.Status != "ok" {
			return fmt.Errorf("the kernel's module postern refused: %s", oneLine(l.s.secrets.redactor().Only(said.Reason)))
		}
		return nil
	case <-ctx.Done():
		return errors.New("the kernel did not answer in time: it is in the middle of native code, or its module postern is gone")
	}
}

// replied takes the kernel's answer to ask.
func (l *link) replied(m *posternv1.KernelMessage) {
	parent, err := jupyter.ParseHeader(m.ParentHeader)
	if err != nil {
		return
	}
	l.s.mu.Lock()
	answer := l.asked[parent.ID]
	l.s.mu.Unlock()
	if answer != nil {
		select {
		case answer <- m.Content:
		default: // it has answered
		}
	}
}

// BeforeCheckpoint has the kernel erase the secrets that it was given from its memory. A
// kernel that does not say that it did is not to be saved. AfterRestore puts them back.
func (s *Shim) BeforeCheckpoint(ctx context.Context) error {
	if !s.secrets.holds() {
		return nil
	}
	s.mu.Lock()
	l := s.link
	s.mu.Unlock()
	if l == nil {
		return proto.Errorf(proto.CodeUnavailable, "the kernel is not connected at present: try again")
	}
	s.secrets.give.Lock()
	defer s.secrets.give.Unlock()
	s.secrets.forget(true)
	ctx, cancel := context.WithTimeout(ctx, secretsTime)
	defer cancel()
	if err := l.ask(ctx, map[string]string{"op": "erase"}); err != nil {
		s.secrets.forget(false) // what it erased it gets again
		return proto.Errorf(proto.CodeUnavailable, "the kernel did not erase its secrets before the checkpoint, so nothing was saved: %v", err)
	}
	return nil
}

// AfterRestore says that processes were put in place, or go on, that have no secrets:
// they get them with the next connection.
func (s *Shim) AfterRestore() { s.secrets.forget(false) }

// serveSecrets adds the path of secrets.
func (s *Shim) serveSecrets(mux *http.ServeMux) {
	handle(s, mux, "/v1/secrets", func(ctx context.Context, all Secrets) (any, error) { return s.SetSecrets(ctx, all) })
}

// SetSecrets is the shim's; see there.
func (a *Agent) SetSecrets(ctx context.Context, all Secrets) (p Put, err error) {
	err = a.order(ctx, "/v1/secrets", all, &p)
	return p, err
}
