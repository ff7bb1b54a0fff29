package shim

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/postern-dev/postern/agentd/kernel/internal/journal"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxClients bounds the clients attached at once.
	maxClients = 64
	// batchBytes is how much is gathered for one write to a client, in bytes.
	batchBytes = 64 << 10
	// maxID bounds a message id in bytes.
	maxID = 256
	// lastWords is how long the last frame may take.
	lastWords = time.Second
)

var errReplaced = proto.Errorf(proto.CodeUnavailable, "another connection took this client's place")

// client is who is attached under a name.
type client struct {
	name   string
	stream net.Conn // nil: it is being replaced
	cancel context.CancelCauseFunc
	// taken is how many of its messages are the shim's to give to the kernel; took has a
	// value when that has grown.
	taken atomic.Uint64
	took  chan struct{}
}

// hangUpLocked ends its stream; the caller has s.mu.
func (c *client) hangUpLocked() {
	if c.stream != nil {
		c.cancel(errStopped)
	}
}

// serveChannels serves one client's stream.
func (s *Shim) serveChannels(w http.ResponseWriter, r *http.Request) {
	request, err := kernelstream.ReadRequest(w, r)
	if err == nil && len(request.Client) > journal.MaxClient {
		err = proto.Errorf(proto.CodeInvalid, "the client's name is over %d bytes", journal.MaxClient)
	}
	if err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	ctx, cancel := context.WithCancelCause(s.ctx)
	defer cancel(nil)
	c := &client{name: request.Client, cancel: cancel, took: make(chan struct{}, 1)}
	if c.name == "" {
		c.name = "anonymous-" + jupyter.NewID()
	}
	if err := s.enter(c); err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	defer s.leave(c)
	conn, err := kernelstream.Accept(w)
	if err != nil {
		s.logger.Warn("stream of a client not taken over", "err", err)
		return
	}
	defer conn.Close() //nolint:errcheck // it is done with
	s.mu.Lock()
	c.stream = conn
	s.mu.Unlock()
	s.signal()

	// Where to go on from.
	last := s.journal.Last()
	from := last
	if at, known := s.journal.Confirmed(c.name); request.Resume && known {
		from = at
	} else if request.AfterSequence > 0 {
		from = min(request.AfterSequence, last)
	}
	s.journal.Register(c.name, from)

	stop := context.AfterFunc(ctx, func() {
		_ = conn.SetReadDeadline(time.Unix(1, 0))
		_ = conn.SetWriteDeadline(time.Now().Add(lastWords))
	})
	defer stop()
	var reading sync.WaitGroup
	reading.Go(func() { cancel(s.fromClient(ctx, c, conn)) })
	err = s.toClient(ctx, c, conn, from, last)
	cancel(err)
	cause := context.Cause(ctx)
	reading.Wait()
	_ = conn.SetWriteDeadline(time.Now().Add(lastWords))
	var told *proto.Error
	if errors.As(cause, &told) {
		_ = kernelstream.NewWriter(conn).End(told) // if it still listens
	}
	if err != nil && !errors.Is(err, io.EOF) {
		s.logger.Debug("client's stream ended", "err", err)
	}
}

// enter takes a client in, in the place of one of the same name.
func (s *Shim) enter(c *client) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped || s.ctx.Err() != nil {
		return errStopped
	}
	if err := s.heldLocked(""); err != nil {
		return err
	}
	old := s.clients[c.name]
	if old == nil && len(s.clients) >= maxClients {
		return proto.Errorf(proto.CodeOverloaded, "%d clients are attached to this kernel already", maxClients)
	}
	if old != nil {
		old.cancel(errReplaced)
	}
	s.clients[c.name] = c
	s.wg.Add(1) // Close has cancelled ctx before it waits
	return nil
}

func (s *Shim) leave(c *client) {
	defer s.wg.Done()
	s.mu.Lock()
	if s.clients[c.name] == c {
		delete(s.clients, c.name)
	}
	c.stream = nil
	s.active = time.Now()
	s.mu.Unlock()
	s.signal()
}

// fromClient takes a client's frames.
func (s *Shim) fromClient(ctx context.Context, c *client, conn net.Conn) error {
	in := kernelstream.NewReader(conn)
	for {
		f, err := in.Next()
		if errors.Is(err, kernelstream.ErrMalformed) {
			return proto.Errorf(proto.CodeInvalid, "%v", err)
		}
		if err != nil {
			return err
		}
		switch {
		case f.GetSend() != nil:
			if err := s.fromMessage(ctx, c, f.GetSend()); err != nil {
				return err
			}
			c.taken.Add(1)
			select {
			case c.took <- struct{}{}:
			default:
			}
		case f.Frame != nil && f.GetConfirm() > 0:
			s.journal.Confirm(c.name, f.GetConfirm())
		}
	}
}

func (s *Shim) fromMessage(ctx context.Context, c *client, m *posternv1.KernelMessage) error {
	h, err := jupyter.Check(m)
	if err == nil && len(h.ID) > maxID {
		err = errors.New("a message id of over 256 bytes")
	}
	if err != nil {
		return proto.Errorf(proto.CodeInvalid, "a message for the kernel was refused: %v", err)
	}
	if !s.fresh(h.ID) {
		return nil // the client could not know that it had arrived
	}
	s.accept(c.name, h, m)
	s.mu.Lock()
	phase, reason, r := s.phase, s.reason, s.requests[h.ID]
	s.mu.Unlock()
	if phase == posternv1.KernelState_KERNEL_STATE_DEAD {
		if r != nil {
			s.reply(r, "the kernel is dead ("+reason+"): restart it")
		}
		return nil
	}
	if err := s.queues[m.Channel].put(ctx, m); err != nil {
		s.answered(h.ID) // it never was in the queue, and who asked has gone
		s.mu.Lock()
		delete(s.known, h.ID) // it may come again
		s.mu.Unlock()
		return err
	}
	// The kernel may have died, or have been restarted, between the two: who refused what
	// waited did not see this one in the queue, and what is answered must not run.
	s.mu.Lock()
	phase, reason = s.phase, s.reason
	answered := r != nil && s.requests[h.ID] != r
	s.mu.Unlock()
	if dead := phase == posternv1.KernelState_KERNEL_STATE_DEAD; dead || answered {
		s.queues[m.Channel].remove(m)
		if dead && r != nil {
			s.reply(r, "the kernel is dead ("+reason+"): restart it")
		}
	}
	return nil
}

// maxKnown is how many messages that clients sent are told from their repetitions.
const maxKnown = 4096

// fresh notes a message's id; false if one with it was taken before.
func (s *Shim) fresh(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.known[id]; known {
		return false
	}
	s.known[id] = struct{}{}
	s.knownOrder = append(s.knownOrder, id)
	if len(s.knownOrder) > maxKnown {
		delete(s.known, s.knownOrder[0])
		s.knownOrder = s.knownOrder[1:]
	}
	return true
}

// toClient sends a client what the journal has for it, as it comes, and changes of the
// kernel's state. Up to replayed it is not new.
func (s *Shim) toClient(ctx context.Context, c *client, conn net.Conn, from, replayed uint64) error {
	reader := s.journal.Reader(c.name, from)
	defer reader.Close() //nolint:errcheck // it was read
	kernel, changed := s.Kernel()
	b, err := kernelstream.Append(nil, &posternv1.KernelFrame{Frame: &posternv1.KernelFrame_Attached{Attached: kernel}})
	if err != nil {
		return err
	}
	told := uint64(0)
	for {
		// Before what the kernel answers: an answer tells that a message was taken, too.
		if taken := c.taken.Load(); taken > told {
			told = taken
			if b, err = kernelstream.Append(b, &posternv1.KernelFrame{Frame: &posternv1.KernelFrame_Taken{Taken: taken}}); err != nil {
				return err
			}
		}
		record, news, err := reader.Poll()
		if err != nil {
			if errors.Is(err, journal.ErrClosed) {
				return errStopped
			}
			return err
		}
		if record != nil && record.Size <= batchBytes {
			b = appendDelivery(b, record, replayed)
			if record.GapFrom == 0 {
				if b, err = appendPayload(b, record); err != nil {
					return err
				}
			}
			if len(b) < batchBytes {
				continue
			}
		}
		select {
		case <-changed:
			kernel, changed = s.Kernel()
			if b, err = kernelstream.Append(b, &posternv1.KernelFrame{Frame: &posternv1.KernelFrame_Changed{Changed: kernel}}); err != nil {
				return err
			}
		default:
		}
		if record != nil && record.Size > batchBytes {
			b = appendDelivery(b, record, replayed)
		}
		if len(b) > 0 {
			if _, err := conn.Write(b); err != nil {
				return err
			}
			b = b[:0]
		}
		if record != nil {
			if record.Size > batchBytes { // straight from the file
				if _, err := record.WriteTo(conn); err != nil {
					return err
				}
			}
			continue
		}
		select {
		case <-news:
		case <-changed:
		case <-c.took:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// appendDelivery appends a frame with a delivery, less the message itself, which is as
// the journal has it and stands last.
func appendDelivery(b []byte, record *journal.Record, replayed uint64) []byte {
	var inner []byte
	inner = protowire.AppendTag(inner, 1, protowire.VarintType)
	inner = protowire.AppendVarint(inner, record.Sequence)
	if record.GapFrom > 0 {
		inner = protowire.AppendTag(inner, 3, protowire.VarintType)
		inner = protowire.AppendVarint(inner, record.GapFrom)
	}
	if record.Sequence <= replayed {
		inner = protowire.AppendTag(inner, 4, protowire.VarintType)
		inner = protowire.AppendVarint(inner, 1)
	}
	message := 0
	if record.GapFrom == 0 {
		inner = protowire.AppendTag(inner, 2, protowire.BytesType)
		inner = protowire.AppendVarint(inner, uint64(record.Size))
		message = int(record.Size)
	}
	outer := protowire.AppendTag(nil, 2, protowire.BytesType)
	outer = protowire.AppendVarint(outer, uint64(len(inner)+message))
	size := uint32(len(outer) + len(inner) + message)
	b = append(b, byte(size>>24), byte(size>>16), byte(size>>8), byte(size))
	return append(append(b, outer...), inner...)
}

func appendPayload(b []byte, record *journal.Record) ([]byte, error) {
	w := appender{b}
	_, err := record.WriteTo(&w)
	return w.b, err
}

type appender struct{ b []byte }

func (a *appender) Write(p []byte) (int, error) {
	a.b = append(a.b, p...)
	return len(p), nil
}
