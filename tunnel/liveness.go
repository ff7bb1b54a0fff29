package tunnel

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// liveness decides whether a tunnel lives. Any byte received on any lane is a
// sign of life; a ping on the control lane asks for one when there was none for
// a heartbeat.
type liveness struct {
	mu       sync.Mutex
	nonce    uint64
	sentAt   time.Time // of the ping that is under way; zero if none is
	rtts     [2]time.Duration
	rttSince time.Time
	last     time.Duration // the newest sample
	pongs    float64       // pongs that may be sent now
	pongAt   time.Time
}

// rttWindow is how long the shortest round trip is believed.
const rttWindow = 5 * time.Minute

// maxPongs is how many pings per second, and at once, are answered.
const maxPongs = 100

func (v *liveness) sample(d time.Duration) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.sampleLocked(d, time.Now())
}

func (v *liveness) sampleLocked(d time.Duration, now time.Time) {
	if d <= 0 {
		d = time.Microsecond
	}
	v.last = d
	if v.rttSince.IsZero() || now.Sub(v.rttSince) > rttWindow {
		v.rtts[1], v.rtts[0], v.rttSince = v.rtts[0], 0, now
	}
	if v.rtts[0] == 0 || d < v.rtts[0] {
		v.rtts[0] = d
	}
}

func (v *liveness) minRTT() time.Duration {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.minLocked()
}

func (v *liveness) minLocked() time.Duration {
	if v.rtts[1] > 0 && v.rtts[1] < v.rtts[0] {
		return v.rtts[1]
	}
	return v.rtts[0]
}

// ping returns the nonce for a ping to send now, unless one is under way and
// younger than again.
func (v *liveness) ping(again time.Duration) (uint64, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := time.Now()
	if !v.sentAt.IsZero() && now.Sub(v.sentAt) < again {
		return 0, false
	}
	v.nonce++
	v.sentAt = now
	return v.nonce, true
}

// pong takes the answer to a ping; only that to the newest counts. It returns
// the round trip, 0 if it does not count.
func (v *liveness) pong(nonce uint64) time.Duration {
	v.mu.Lock()
	defer v.mu.Unlock()
	if nonce != v.nonce || v.sentAt.IsZero() {
		return 0
	}
	now := time.Now()
	v.sampleLocked(now.Sub(v.sentAt), now)
	v.sentAt = time.Time{}
	return v.last
}

// measureQueue sends the ping that measures the queue of the path; see windows.
func (t *Tunnel) measureQueue() {
	if nonce, ok := t.live.ping(t.cfg.DeadAfter); ok {
		_ = t.control.send(&message{typ: msgPing, nonce: nonce})
	}
}

// mayPong limits the pings that are answered.
func (v *liveness) mayPong() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := time.Now()
	v.pongs = min(v.pongs+now.Sub(v.pongAt).Seconds()*maxPongs, maxPongs)
	v.pongAt = now
	if v.pongs < 1 {
		return false
	}
	v.pongs--
	return true
}

// clock is the time since the process started, by the monotonic clock.
func clock() time.Duration { return time.Since(started) }

var started = time.Now()

// tick looks after a tunnel. now is clock(), woke the time at which this process
// last found that it had been stopped itself: silence before that is its own, not
// the peer's. It returns when to look again.
func (t *Tunnel) tick(now, woke time.Duration) (next time.Duration) {
	every := t.cfg.tickEvery()
	t.mu.Lock()
	if t.err != nil {
		t.mu.Unlock()
		return now + time.Hour
	}
	passed := now - t.ticked
	t.ticked = now
	busy := t.inbound.Load()+t.opened.Load() > 0
	heard := woke
	var check []*lane
	for _, l := range t.lanes {
		heard = max(heard, time.Duration(l.ws.wire.rxAt.Load()))
		rx, tx := l.ws.wire.rx.Load(), l.ws.wire.tx.Load()
		if rx == l.lastRx && tx == l.lastTx {
			l.stuck += passed
			l.quiet += passed
		} else {
			t.metrics.moved(l)
			l.lastRx, l.lastTx, l.stuck, l.quiet = rx, tx, 0, 0
		}
		if l.class != Control {
			busy = true
			check = append(check, l)
		}
	}
	control := t.control
	t.mu.Unlock()

	heartbeat := t.cfg.idleHeartbeat()
	if busy {
		heartbeat = t.cfg.Heartbeat
	}
	if !t.isDialer {
		// The dialer asks first, so that one exchange usually serves both.
		heartbeat += every
	}
	silent := now - heard
	switch {
	case silent >= t.cfg.DeadAfter:
		t.end(ErrSilent)
		return now + time.Hour
	case silent+every/8 >= heartbeat:
		if nonce, ok := t.live.ping(every / 2); ok {
			_ = control.send(&message{typ: msgPing, nonce: nonce})
		}
	}
	for _, l := range check {
		t.tickLane(l, passed)
	}
	if busy {
		return now + every
	}
	return max(now+every, heard+heartbeat)
}

// watch finds out when this process was stopped: ticks came late.
type watch struct{ last, woke time.Duration }

func (w *watch) tick(now, every time.Duration) {
	if w.last > 0 && now-w.last > 3*every+50*time.Millisecond {
		w.woke = now
	}
	w.last = now
}

// pathTimeout is how long sent bytes of a solo lane may stay unacknowledged.
const pathTimeout = 15 * time.Second

// tickLane keeps house on a bulk or solo lane.
func (t *Tunnel) tickLane(l *lane, passed time.Duration) {
	if l.class == Solo {
		if l.stuck >= pathTimeout {
			l.stuck = 0
			if deadPath(l.ws.wire.conn, pathTimeout) {
				l.endSolo(ErrLost)
			}
		}
		if l.quiet >= t.cfg.SoloQuiet {
			l.quiet = 0
			l.keepOpen()
		}
		return
	}
	if l.mux.count() > 0 {
		l.idle = 0
		l.unretire()
		t.checkBulk(l, passed)
		return
	}
	l.idle += passed
	if t.isDialer && l.idle >= t.cfg.BulkIdle {
		l.idle = 0
		l.retire()
	}
}

// pingTime is how long a WebSocket ping may take to be written.
const pingTime = time.Second

// keepOpen sends a WebSocket ping over a quiet solo lane, below its TLS, where
// nothing else of ours can pass; for what stands between the two ends (nginx ends
// a connection after 60 s of silence). It is not answered. Where sent bytes still
// wait for the peer's window it would wait behind them: the reader is slow, not
// the lane quiet.
func (l *lane) keepOpen() {
	if l.ws.ws == nil { // the Carrier's, see CarrierServer
		return
	}
	if unacknowledged(l.ws.wire.conn) {
		return
	}
	l.tunnel.spawn(func() {
		ctx, cancel := context.WithTimeout(context.Background(), pingTime)
		defer cancel()
		_ = l.ws.ws.Ping(ctx) // ends with ctx, for want of a pong
	})
}

// laneSilence is after how many DeadAfter a bulk lane with streams, asked for a
// sign of life, counts as lost although the tunnel lives: its connection alone
// died on the way. It is long, because the answer may stand behind the bulk of a
// slow link; anything that moves on the lane is an answer.
const laneSilence = 4

func (t *Tunnel) checkBulk(l *lane, passed time.Duration) {
	if rx := l.ws.wire.rx.Load(); rx != l.heardRx {
		l.heardRx, l.silent, l.asked = rx, 0, false
		return
	}
	l.silent += passed
	switch {
	case l.silent >= laneSilence*t.cfg.DeadAfter:
		l.fail(fmt.Errorf("%w: lane silent", ErrLost))
	case l.silent >= t.cfg.DeadAfter && !l.asked:
		l.asked = true
		_ = l.send(&message{typ: msgPing})
	}
}

// A bulk lane without streams is retired by the dialer: it opens no more streams
// there and says so; the acceptor closes the lane if it has none either. If it
// has opened one meanwhile the lane goes on.

func (l *lane) mayOpen() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.retiring
}

func (l *lane) retire() {
	l.mu.Lock()
	l.retiring = true
	l.mu.Unlock()
	_ = l.send(&message{typ: msgRetire})
}

func (l *lane) unretire() {
	l.mu.Lock()
	l.retiring = false
	l.mu.Unlock()
}

// peerRetires runs on the acceptor.
func (l *lane) peerRetires() {
	l.mu.Lock()
	l.retiring = true
	l.mu.Unlock()
	l.tunnel.spawn(func() {
		if len(l.opens) > 0 || l.mux.count() > 0 {
			l.unretire()
			return
		}
		l.fail(ErrClosed)
	})
}
