package tunnel

import (
	"fmt"
	"sync"
	"time"
)

// Flow control. yamux's window is one number per connection, sent again only
// when half of it was read: too small for a long path, too large for memory and
// for the latency of everything that shares the path. Here the receiver grants
// credit itself, in yamux's own window-update frames: yamux is told that windows
// are huge and its updates are dropped (mux.go); streamFlow decides instead.
//
//	credit = granted - consumed: bytes that may be under way or unread
//
// A stream starts with the 256 KiB that yamux fixes. Control streams keep that.
// Bulk streams get more by measured need, out of Config.WindowBudget, up to
// maxWindow; see window.go.
type streamFlow struct {
	s *stream

	mu        sync.Mutex
	window    int64 // credit that the stream should have
	granted   int64
	received  int64
	consumed  int64
	reserved  int64 // of the tunnel's budget: window above yamuxWindowStart
	lastGrant time.Time
	epoch     time.Time // start of the growth measurement
	epochFrom int64     // consumed at that time
	round     uint32    // of the tunnel's windows, as this stream last saw it
	clear     uint32    // likewise: the last growth's round
	released  bool
}

// grantDelay is how long consumed bytes may wait for their grant: small grants
// show the sender that the link moves.
const grantDelay = 200 * time.Millisecond

// start returns what the stream is granted beyond yamux's first window, when
// this side sends its SYN or ACK.
func (f *streamFlow) start() uint32 {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.growLocked(f.s.lane.firstWindow())
	extra := max(f.window-yamuxWindowStart, 0)
	f.granted += extra
	return uint32(extra)
}

// growLocked raises the window to w as far as the budget allows.
func (f *streamFlow) growLocked(w int64) {
	w = min(w, maxWindow)
	need := w - yamuxWindowStart - f.reserved
	if f.released || need <= 0 {
		f.window = max(f.window, min(w, yamuxWindowStart+f.reserved))
		return
	}
	f.reserved += f.s.lane.tunnel.windows.reserve(need)
	f.window = yamuxWindowStart + f.reserved
}

// receive counts n arriving bytes; more than was granted ends the lane.
func (f *streamFlow) receive(n uint32) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.received += int64(n)
	if f.received > f.granted {
		return fmt.Errorf("%w: stream %d overran its window", ErrProtocol, f.s.id)
	}
	return nil
}

// consume counts n bytes that the reader took and returns the credit to grant.
func (f *streamFlow) consume(n int) uint32 {
	t := f.s.lane.tunnel
	share := int64(maxWindow)
	if f.s.lane.class == Bulk {
		var ping bool
		if share, ping = t.windows.consumed(int64(n), &f.round, t.RTT()); ping {
			t.measureQueue()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.consumed += int64(n)
	if f.released {
		return 0
	}
	if f.s.lane.class == Bulk {
		f.adaptLocked()
	}
	limit := min(f.window, share)
	missing := limit - (f.granted - f.consumed)
	if missing < limit/4 {
		if missing < 4<<10 {
			return 0
		}
		if now := time.Now(); now.Sub(f.lastGrant) < grantDelay {
			return 0
		}
	}
	f.lastGrant = time.Now()
	f.granted += missing
	return uint32(missing)
}

// release gives the budget back.
func (f *streamFlow) release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.released {
		f.released = true
		f.s.lane.tunnel.windows.release(f.reserved)
		f.reserved = 0
	}
}

// adaptLocked doubles the window of a bulk stream that used up half of it in less
// than two round trips (the rule of QUIC implementations), on a long path only
// while no queue was seen.
func (f *streamFlow) adaptLocked() {
	taken := f.consumed - f.epochFrom
	if taken*2 < f.window {
		return
	}
	now := time.Now()
	took := now.Sub(f.epoch)
	t := f.s.lane.tunnel
	rtt := t.RTT()
	if !f.epoch.IsZero() && float64(took)*float64(f.window) < float64(4*rtt)*float64(taken) &&
		(rtt < lanRTT || t.windows.mayGrow(&f.clear)) {
		f.growLocked(2 * f.window)
	}
	f.epoch, f.epochFrom = now, f.consumed
}
