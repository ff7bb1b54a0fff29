package link

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/tunnel"
)

// Limits of the requests inside the tunnel.
const (
	readHeaderTimeout = 10 * time.Second
	maxHeaderBytes    = 64 << 10
)

// session is a tunnel with the server that answers on it.
type session struct {
	t      *tunnel.Tunnel
	server *http.Server
	cancel context.CancelFunc
	wg     sync.WaitGroup // the server, and the retirement
}

// adopt takes a new tunnel into service and retires the one before.
func (k *Keeper) adopt(t *tunnel.Tunnel, welcome *posternv1.HelloResponse) *session {
	ctx, cancel := context.WithCancel(context.Background())
	s := &session{t: t, cancel: cancel}
	s.server = &http.Server{
		Handler:           k.cfg.Handler,
		ReadHeaderTimeout: readHeaderTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		BaseContext:       func(net.Listener) context.Context { return context.WithValue(ctx, tunnelKey{}, t) },
		ErrorLog:          slog.NewLogLogger(k.logger.Handler(), slog.LevelDebug),
	}
	s.wg.Go(func() {
		s.server.Serve(t.Listener()) //nolint:errcheck // it ends with the tunnel, whose cause says more
		<-t.Done()
		cancel()
	})
	now := State{
		Up: true, Since: time.Now(), URL: k.cfg.URL, TunnelID: t.ID(), Remote: t.RemoteAddr().String(),
		PeerSoftware: welcome.GetVersion().GetSoftware(), Minor: welcome.GetVersion().GetMinor(),
	}
	if at := welcome.GetServerTime(); at.IsValid() && at.AsTime().Unix() > 0 {
		now.Skew = time.Since(at.AsTime()).Round(time.Millisecond)
	}
	k.sessions = append(live(k.sessions), s)
	k.mu.Lock()
	old, was := k.current, k.state
	moved := was.Up && old != nil && old.t.Err() == nil
	if moved {
		now.Since = was.Since
	}
	k.current, k.state = s, now
	draining := k.draining
	k.mu.Unlock()
	if old != nil {
		old.retire(k.cfg.DrainFor)
	}
	if draining {
		t.GoAway(0, k.cfg.DrainFor, "agentd is stopping")
	}
	if moved {
		k.logger.Info("link moved to a new tunnel", "tunnel", now.TunnelID)
	} else {
		k.logger.Info("link up", "tunnel", now.TunnelID, "remote", now.Remote, "rtt_seconds", t.RTT().Seconds())
	}
	if k.cfg.Changed != nil {
		k.cfg.Changed(now)
	}
	return s
}

// live drops the sessions whose tunnels have ended.
func live(all []*session) []*session {
	var left []*session
	for _, s := range all {
		select {
		case <-s.t.Done():
			s.wg.Wait() // at once: the tunnel's streams are gone
		default:
			left = append(left, s)
		}
	}
	return left
}

// farewell is how long, once the last answer was sent, the control plane may take
// to read it and to close a tunnel that was told to go away.
const farewell = 30 * time.Second

// retire lets a tunnel's streams finish, and then closes it.
func (s *session) retire(within time.Duration) {
	if s.t.Err() != nil {
		return
	}
	s.t.GoAway(0, within, "agentd has a newer tunnel")
	s.wg.Go(func() {
		// What the control plane has opened before it read that still comes, and would be
		// refused: it closes the tunnel itself as soon as nothing is under way there.
		late := time.NewTimer(min(within, lateStreams))
		defer late.Stop()
		select {
		case <-s.t.Done():
		case <-late.C:
		}
		s.finish(within, farewell)
	})
}

// lateStreams is how long a tunnel that made way for another one still takes streams.
const lateStreams = 3 * time.Second

// finish waits until the requests under way have been answered and the answers
// read, and closes the tunnel. Closing it earlier would cut what is on its way,
// and only the reader knows when that has come: it closes its end then.
func (s *session) finish(within, patience time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	watched := make(chan struct{})
	s.wg.Go(func() {
		defer close(watched)
		select {
		case <-s.t.Done(): // nothing is left to wait for
			cancel()
		case <-ctx.Done():
		}
	})
	s.server.Shutdown(ctx) //nolint:errcheck // what is left by then is cut
	s.settle(patience)
	s.t.Close(tunnel.ErrReplaced) //nolint:errcheck // it may have ended by itself
	cancel()
	<-watched
}

// settle waits for the control plane to close the tunnel, or, should it not do
// that, until no stream is left and a moment has passed.
func (s *session) settle(patience time.Duration) {
	end := time.NewTimer(patience)
	defer end.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	quiet, enough := 0, 10+int(4*s.t.RTT()/(20*time.Millisecond))
	for quiet < enough {
		select {
		case <-s.t.Done():
			return
		case <-end.C:
			return
		case <-tick.C:
		}
		quiet++
		if s.t.Streams() > 0 {
			quiet = 0
		}
	}
}

// Drain tells the control plane that this host is about to stop; requests that
// are under way go on, and it ends the tunnel itself after within.
func (k *Keeper) Drain(within time.Duration) {
	k.mu.Lock()
	k.draining = true
	current := k.current
	k.mu.Unlock()
	if current != nil && current.t.Err() == nil {
		current.t.GoAway(0, within, "agentd is stopping")
	}
}

// lastWord is farewell when agentd stops: nothing is running any more.
const lastWord = 3 * time.Second

// closeAll closes every tunnel and waits.
func (k *Keeper) closeAll() {
	k.mu.Lock()
	current := k.current
	k.current = nil
	k.state.Up = false
	k.mu.Unlock()
	if current != nil {
		current.finish(lastWord, lastWord)
	}
	for _, s := range k.sessions {
		s.t.Close(tunnel.ErrClosed) //nolint:errcheck // it may have ended by itself
		s.cancel()
		s.server.Close() //nolint:errcheck // its streams are gone
		s.wg.Wait()
	}
}
