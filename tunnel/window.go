package tunnel

import (
	"sync"
	"time"
)

// maxWindow is the largest window of one stream: 300 MB/s at 100 ms. It must
// stay below half of yamuxWindowMax.
const maxWindow = 32 << 20

// windows is a tunnel's budget of receive windows beyond the 256 KiB that every
// stream has.
type windows struct {
	mu   sync.Mutex
	left int64
}

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

// limit is the credit that one bulk stream may have now.
func (w *windows) limit() int64 { return maxWindow }

// firstWindow is the window that a stream of this lane starts with.
func (l *lane) firstWindow() int64 {
	switch {
	case l.class != Bulk:
		return yamuxWindowStart
	case l.tunnel.RTT() < 2*time.Millisecond:
		return 512 << 10
	}
	return 1 << 20
}
