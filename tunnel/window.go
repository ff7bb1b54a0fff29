package tunnel

import (
	"sync"
	"time"
)

// maxWindow is the largest window of one stream: 300 MB/s at 100 ms. It must
// stay below half of yamuxWindowMax.
const maxWindow = 32 << 20

// bulkWindow is what a bulk stream starts with on a local path. On a longer one it
// starts with yamux's 256 KiB, so as not to fill the queue of a slow one at once.
const bulkWindow = 512 << 10

// firstWindow is the window that a stream of this lane starts with.
func (l *lane) firstWindow() int64 {
	if l.class == Bulk && l.tunnel.RTT() < lanRTT {
		return bulkWindow
	}
	return yamuxWindowStart
}

// windows is what the bulk streams of a tunnel share on the receiving side.
//
// The budget bounds memory: windows beyond the 256 KiB that every stream has.
//
// The total bounds delay: bytes under way in excess of what the path holds stand
// in a queue before its bottleneck, and everything else, control lane included,
// waits behind them. While bulk flows, pings on the control lane measure that
// queue; when it holds more than queueTarget, the credit of all bulk streams
// together follows rate x (shortest round trip + queueTarget), else it grows.
type windows struct {
	mu   sync.Mutex
	left int64 // of the budget

	total  int64 // credit of all bulk streams together; 0 is no limit
	share  int64 // of one stream; 0 is no limit
	round  uint32
	active int           // streams that consumed in this round
	bytes  int64         // consumed in this round
	began  time.Time     // of this round
	asked  bool          // this round's ping is under way
	late   time.Duration // what the last round's ping saw above the shortest
	knee   int64         // the total at which the path was full last
	streak int           // steps of growth in a row
	clear  uint32        // rounds that saw no queue
	rate   float64       // bytes per second, smoothed over some rounds
}

const (
	queueTarget = 2 * time.Millisecond
	// growFirst is the queue that a step of growth may add. Away from where the
	// path was full last, steps in a row double, up to a quarter of the total.
	growFirst = 500 * time.Microsecond
	// roundMin and roundBytes are what makes a round long enough to be measured.
	roundMin   = 50 * time.Millisecond
	roundBytes = 128 << 10
	// The total does not go below these: a share of a stream must hold a few
	// frames, and on a local path what looks like a queue is a busy processor.
	shareMin    = 48 << 10
	totalMin    = 128 << 10
	totalMinLAN = 1 << 20
	lanRTT      = 2 * time.Millisecond
)

func (w *windows) reserve(n int64) int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	n = max(min(n, w.left), 0)
	w.left -= n
	return n
}

func (w *windows) release(n int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.left += n
}

// consumed counts n bytes that a bulk stream took; seen is the stream's memory of
// the round. It returns the credit that one stream may have now, and whether a
// ping should be sent to measure the queue.
func (w *windows) consumed(n int64, seen *uint32, rtt time.Duration) (limit int64, ping bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.round == 0 {
		w.round, w.began = 1, time.Now()
	}
	if *seen != w.round {
		*seen = w.round
		w.active++
	}
	w.bytes += n
	if !w.asked && w.bytes >= roundBytes {
		if time.Since(w.began) >= max(roundMin, rtt) {
			w.asked, ping = true, true
		}
	}
	if w.share == 0 {
		return maxWindow, ping
	}
	return w.share, ping
}

// mayGrow reports whether a stream may double its window: once for each round that
// saw no queue. seen is the stream's memory of the last.
func (w *windows) mayGrow(seen *uint32) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if *seen == w.clear {
		return false
	}
	*seen = w.clear
	return true
}

// measure ends a round with the round trip that its ping saw.
func (w *windows) measure(rtt, shortest time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.asked {
		return
	}
	now := time.Now()
	took := max(now.Sub(w.began), time.Millisecond)
	rate := float64(w.bytes) / took.Seconds()
	if w.rate == 0 {
		w.rate = rate
	}
	w.rate += (rate - w.rate) / 4
	active := max(w.active, 1)
	w.round++
	if w.round == 0 {
		w.round = 1
	}
	w.active, w.bytes, w.began, w.asked = 0, 0, now, false

	// A queue stands; what passes with the next answer was the processor's.
	late := rtt - shortest
	standing := min(late, w.late)
	w.late = late
	free := late <= queueTarget+shortest/8
	if free {
		w.clear++
	}
	floor := int64(max(totalMin, shareMin*active))
	if shortest < lanRTT {
		floor = totalMinLAN
	}
	fits := int64(w.rate * (shortest + queueTarget).Seconds())
	switch {
	case standing > queueTarget+shortest/16:
		if w.total == 0 {
			w.total = fits
		} else {
			w.total = min(w.total, max(fits, w.total/2))
		}
		w.knee, w.streak = w.total, 0
	case w.total > 0 && free && fits*2 > w.total: // it is the total that limits
		w.total += min(max(int64(w.rate*growFirst.Seconds()), w.total/64)<<w.streak, w.total/4)
		if w.total < w.knee*9/10 || w.total > w.knee*5/4 {
			w.streak = min(w.streak+1, 8)
		}
		if w.total > int64(active)*maxWindow {
			w.total = 0
		}
	}
	if w.total > 0 {
		w.total = max(w.total, floor)
		w.share = w.total / int64(active)
	} else {
		w.share = 0
	}
}
