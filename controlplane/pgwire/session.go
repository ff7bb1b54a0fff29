package pgwire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/wirestream"
)

const (
	// smallRead is how much is read from a client at once, bigRead while it sends
	// much; in bytes.
	smallRead = 4 << 10
	bigRead   = 128 << 10
	// endTime is how long a host may take to tell how a session ended whose client
	// has gone; hangUpTime how long what a client has left behind after its Terminate
	// may run.
	endTime    = 5 * time.Second
	hangUpTime = time.Second
)

var bigReads = sync.Pool{New: func() any { b := make([]byte, wirestream.HeaderSize+bigRead); return &b }}

// session is a client and its stream. Three goroutines belong to it: up reads the
// client, down the host, watch waits for what ends it from outside. Its buffers hold 12 KiB
// when it is idle and at most 512 KiB.
type session struct {
	server  *Server
	info    Session
	raw     net.Conn
	conn    net.Conn
	out     *gather // nil without TLS
	agent   Agent
	expires time.Time
	entries Entries
	key     *key

	stream io.ReadWriteCloser
	w      *wirestream.Writer
	r      *wirestream.Reader

	done chan struct{} // closed when both directions have ended

	// writing is held while the client is written to, and taken before mu.
	writing sync.Mutex
	gone    bool // nothing more for the client; guarded by writing

	mu         sync.Mutex // guards what follows
	up, down   meter
	asked      uint64 // messages that end with ReadyForQuery
	answered   uint64 // ReadyForQuery
	dirty      bool   // messages behind the last that is asked
	status     byte   // of the last ReadyForQuery: I, T or E
	terminated bool   // the client has said that it leaves
	quit       *fatal // why it ends as soon as it is idle
	closing    bool
	over       bool  // the host has ended it
	cause      error // why it ended; nil by the client's will
	timer      *time.Timer

	leaving sync.WaitGroup // the end, from closing on
}

// opened waits for the host's first frame.
func (s *session) opened() (*posternv1.WireOpened, error) {
	kind, err := s.r.Next()
	if err != nil {
		return nil, err
	}
	switch kind {
	case wirestream.Opened:
		opened := &posternv1.WireOpened{}
		return opened, s.r.Message(opened)
	case wirestream.End:
		end := &posternv1.WireEnd{}
		if err := s.r.Message(end); err != nil {
			return nil, err
		}
		if f := ended(end); f != nil {
			return nil, f
		}
	}
	return nil, fmt.Errorf("%w: the host's first frame is %q", wirestream.ErrMalformed, byte(kind))
}

// ended is why a host ended a session; nil if the client did.
func ended(end *posternv1.WireEnd) *fatal {
	if end.Error == nil {
		return nil
	}
	f := explain(reasonHost, proto.FromDetail(end.Error))
	if len(end.Sqlstate) == 5 {
		f.state = end.Sqlstate
	}
	return f
}

// begin makes it ready to run.
func (s *session) begin(minor uint32) {
	s.key = s.server.keys.add(s, minor)
	s.status = 'I'
	s.up.begun = func(kind byte) {
		switch kind {
		case 'Q', 'S', 'F': // Query, Sync, FunctionCall
			s.asked++
			s.dirty = false
		case 'd', 'c', 'f', 'H': // COPY, Flush
		case 'X':
			s.terminated = true
		default:
			s.dirty = true
		}
	}
	s.down.ended = func(kind, first byte) {
		if kind == 'Z' {
			s.answered++
			s.status = first
		}
	}
}

// run serves the session until it has ended, and returns then.
func (s *session) run() {
	defer s.server.release(s.info.Principal)
	defer s.server.remove(s)
	defer s.server.keys.remove(s.key)
	var work sync.WaitGroup
	work.Go(s.readClient)
	work.Go(s.watch)
	s.readHost()
	s.stream.Close() //nolint:errcheck // it has ended
	close(s.done)
	work.Wait()
	s.leaving.Wait()
	s.mu.Lock()
	s.timer.Stop()
	cause := s.cause
	s.mu.Unlock()
	s.entries.Close(cause)
}

// watch ends the session when its token expires or its tunnel is replaced.
func (s *session) watch() {
	var expired <-chan time.Time
	if !s.expires.IsZero() {
		timer := time.NewTimer(time.Until(s.expires))
		defer timer.Stop()
		expired = timer.C
	}
	retired := s.agent.Retired()
	for {
		select {
		case <-s.done:
			return
		case <-expired:
			s.finish(fatalf(reasonRefused, stateAdminShutdown, "terminating connection: the API token expired"))
			return
		case <-retired:
			s.endWhenIdle(fatalf(reasonAgent, stateAdminShutdown, "terminating connection: agent %s goes away or has a newer tunnel", s.info.Agent).with("connect again"))
			retired = nil
		}
	}
}

// readClient passes the client's bytes on.
func (s *session) readClient() {
	small := make([]byte, wirestream.HeaderSize+smallRead)
	buffer, big := small, (*[]byte)(nil)
	defer func() {
		if big != nil {
			bigReads.Put(big)
		}
	}()
	for {
		n, err := s.conn.Read(buffer[wirestream.HeaderSize:])
		if n > 0 {
			if !s.forward(buffer[wirestream.HeaderSize:][:n]) {
				return
			}
			s.server.cfg.Metrics.received(n)
			if werr := s.w.Filled(buffer, n); werr != nil {
				return // whoever reads the host learns why
			}
		}
		if err != nil {
			s.finish(nil)
			return
		}
		switch {
		case n == len(small)-wirestream.HeaderSize && big == nil:
			big = bigReads.Get().(*[]byte)
			buffer = *big
		case n < smallRead/2 && big != nil:
			bigReads.Put(big)
			buffer, big = small, nil
		}
	}
}

// forward notes what goes to the host; false if nothing may any more.
func (s *session) forward(p []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.up.add(p)
	return true
}

// readHost passes on what the host sends, until the stream ends.
func (s *session) readHost() {
	for {
		kind, err := s.r.Next()
		if err != nil {
			s.broken(err)
			return
		}
		switch kind {
		case wirestream.Data:
			for s.r.Left() > 0 && err == nil {
				var chunk []byte
				if chunk, err = s.r.Chunk(); err == nil {
					s.toClient(chunk)
				}
			}
		case wirestream.Event:
			event := &posternv1.WireEvent{}
			if err = s.r.Message(event); err == nil {
				s.entries.Event(event)
			}
		case wirestream.End:
			end := &posternv1.WireEnd{}
			if err = s.r.Message(end); err == nil {
				s.end(end)
				return
			}
		default:
			err = fmt.Errorf("%w: %q in the middle", wirestream.ErrMalformed, byte(kind))
		}
		if err != nil {
			s.broken(err)
			return
		}
	}
}

// toClient writes bytes to the client. When it can't, the session ends, and what
// follows is passed over.
func (s *session) toClient(p []byte) {
	s.writing.Lock()
	if s.gone {
		s.writing.Unlock()
		return
	}
	err := s.write(p)
	if err != nil {
		s.gone = true
		s.raw.Close() //nolint:errcheck // so that its reader stops
		s.writing.Unlock()
		s.finish(nil)
		return
	}
	s.mu.Lock()
	s.down.add(p)
	quit := s.quit
	if quit != nil && !s.idleLocked() {
		quit = nil
	}
	s.mu.Unlock()
	s.writing.Unlock()
	s.server.cfg.Metrics.sent(len(p))
	if quit != nil {
		s.finishIf(quit, s.idleLocked)
	}
}

func (s *session) write(p []byte) error {
	if s.out == nil || len(p) <= 16<<10 {
		_, err := s.conn.Write(p)
		return err
	}
	s.out.hold()
	_, err := s.conn.Write(p)
	return errors.Join(err, s.out.flush())
}

// idleLocked reports that the client waits for nothing and is in no transaction.
func (s *session) idleLocked() bool {
	return s.restLocked() && s.status == 'I'
}

// restLocked reports that the client waits for nothing.
func (s *session) restLocked() bool {
	return s.up.edge() && s.down.edge() && !s.dirty && s.asked == s.answered
}

// endWhenIdle ends the session as soon as it is idle, now if it is.
func (s *session) endWhenIdle(why *fatal) {
	s.mu.Lock()
	if s.quit == nil {
		s.quit = why
	}
	s.mu.Unlock()
	s.finishIf(why, s.idleLocked)
}

// end is the host's last word.
func (s *session) end(end *posternv1.WireEnd) {
	f := ended(end)
	s.hostEnded(f)
	if end.Told {
		f = nil
	}
	s.finish(f)
}

// broken is a stream that ended without the host's last word.
func (s *session) broken(err error) {
	f := fatalf(reasonAgent, stateConnectionFailure, "terminating connection: agent %s stopped answering: agentd or its link died", s.info.Agent)
	if lost := s.agent.Err(); lost != nil {
		f.message, f.detail = fmt.Sprintf("terminating connection: agent %s went away", s.info.Agent), proto.Detail(lost).Message
	} else if errors.Is(err, wirestream.ErrMalformed) {
		f.message = fmt.Sprintf("terminating connection: agent %s broke the protocol", s.info.Agent)
		s.server.log.Error("wire session broken off", "session", s.info.ID, "agent", s.info.Agent, "err", err)
	}
	s.hostEnded(f)
	s.finish(f)
}

// hostEnded notes that nothing more comes from the host, and why.
func (s *session) hostEnded(why *fatal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	if why != nil && !s.closing {
		s.cause = why
	}
}

// finish ends the session. The client is told why, if that may stand where it is, and
// is let go; the host gets some time to tell how it ended. nil is for a client that
// has gone or was told. Only the first call counts.
func (s *session) finish(why *fatal) { s.finishIf(why, func() bool { return true }) }

func (s *session) finishIf(why *fatal, still func() bool) {
	s.mu.Lock()
	if s.closing || !still() {
		s.mu.Unlock()
		return
	}
	s.closing = true
	s.leaving.Add(1)
	if why != nil && s.cause == nil {
		s.cause = why
	}
	over, busy, terminated, edge := s.over, !s.restLocked(), s.terminated, s.up.edge()
	s.timer = time.AfterFunc(endTime, func() { s.stream.Close() }) //nolint:errcheck // its reader learns of it
	s.mu.Unlock()

	s.conn.SetWriteDeadline(time.Now().Add(farewell / 2)) //nolint:errcheck // a connection that can't has ended
	s.writing.Lock()
	if !s.gone {
		s.gone = true
		var err error
		if why != nil && s.atEdge() {
			_, err = s.conn.Write(why.encode())
		}
		if err == nil && s.atEdge() {
			s.conn.Close() //nolint:errcheck // it is done with
		}
	}
	s.writing.Unlock()
	s.raw.Close() //nolint:errcheck // likewise
	go func() {
		defer s.leaving.Done()
		if !over {
			s.leave(busy, terminated, edge)
		}
	}()
}

func (s *session) atEdge() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.down.edge()
}

// leave has the host end what is left of the session. The stream is closed
// endTime after finish at the latest, which ends all of this.
func (s *session) leave(busy, terminated, edge bool) {
	if busy {
		if terminated {
			// As in PostgreSQL what was asked for before goes on, for a moment.
			select {
			case <-s.done:
				return
			case <-time.After(hangUpTime):
			}
		}
		ctx, cancel := context.WithTimeout(context.Background(), endTime)
		defer cancel()
		go func() {
			select {
			case <-s.done:
				cancel()
			case <-ctx.Done():
			}
		}()
		if err := s.cancel(ctx, s.info.ID, s.info.Principal); err != nil {
			s.stream.Close() //nolint:errcheck // that ends it, too
			return
		}
	}
	switch {
	case terminated:
	case edge:
		s.w.Filled(append(make([]byte, wirestream.HeaderSize), 'X', 0, 0, 0, 4), 5) //nolint:errcheck // the host has gone
	default: // it waits for the rest of a message
		s.stream.Close() //nolint:errcheck // likewise
	}
}

// cancel asks the host to end a statement, or whatever the session runs.
func (s *session) cancel(ctx context.Context, id string, by *posternv1.Principal) error {
	return s.agent.CancelQuery(ctx, &posternv1.CancelQueryRequest{QueryId: id, Principal: by})
}
