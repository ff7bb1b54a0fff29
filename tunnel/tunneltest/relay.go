package tunneltest

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// RelayConfig describes the path that a Relay pretends to be.
type RelayConfig struct {
	// Rate is the bottleneck's bytes per second in each direction, shared by all
	// connections in the order in which bytes arrive. 0 means no limit.
	Rate int
	// Delay is the time that every byte is under way, in each direction.
	Delay time.Duration
	// Queue is how many bytes may wait before the bottleneck, per direction and
	// over all connections; then the relay stops reading. 0 means 1 MiB.
	Queue int
}

// Relay is a TCP relay in user space that paces and delays what passes (kernels
// without netem need one), and that can fall silent or cut. Order is kept.
type Relay struct {
	cfg    RelayConfig
	ln     net.Listener
	target string

	up, down *direction

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
	silent chan struct{} // closed while bytes may pass
	wg     sync.WaitGroup
	done   chan struct{}

	bytes atomic.Int64
}

// direction is one way through the bottleneck: a FIFO of pieces of all
// connections.
type direction struct {
	mu    sync.Mutex
	cond  sync.Cond
	room  int       // bytes that may still enter
	clear time.Time // when the bottleneck has sent what is in it
}

// NewRelay starts a relay on loopback towards target.
func NewRelay(target string, cfg RelayConfig) (*Relay, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	if cfg.Queue == 0 {
		cfg.Queue = 1 << 20
	}
	r := &Relay{cfg: cfg, ln: ln, target: target, conns: make(map[net.Conn]struct{}), silent: make(chan struct{}), done: make(chan struct{})}
	close(r.silent)
	r.up, r.down = newDirection(cfg), newDirection(cfg)
	r.wg.Add(1)
	go r.accept()
	return r, nil
}

func newDirection(cfg RelayConfig) *direction {
	d := &direction{room: cfg.Queue}
	d.cond.L = &d.mu
	return d
}

// Addr is where the relay listens.
func (r *Relay) Addr() string { return r.ln.Addr().String() }

// Bytes is how many bytes have come out of the relay, both directions.
func (r *Relay) Bytes() int64 { return r.bytes.Load() }

// Silence stops all bytes, both directions, without closing anything. New
// connections are accepted and hear nothing either.
func (r *Relay) Silence() {
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case <-r.silent:
		r.silent = make(chan struct{})
	default:
	}
}

// Resume ends Silence.
func (r *Relay) Resume() {
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case <-r.silent:
	default:
		close(r.silent)
	}
}

// Cut closes all connections; new ones are accepted.
func (r *Relay) Cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.conns {
		_ = c.Close()
	}
}

// Conns is how many connections are relayed now.
func (r *Relay) Conns() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.conns) / 2
}

// Close ends the relay and everything in it.
func (r *Relay) Close() {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return
	}
	r.closed = true
	close(r.done)
	_ = r.ln.Close()
	for c := range r.conns {
		_ = c.Close()
	}
	r.mu.Unlock()
	for _, d := range []*direction{r.up, r.down} {
		d.mu.Lock()
		d.cond.Broadcast()
		d.mu.Unlock()
	}
	r.wg.Wait()
}

func (r *Relay) accept() {
	defer r.wg.Done()
	for {
		a, err := r.ln.Accept()
		if err != nil {
			return
		}
		r.wg.Add(1)
		go func() {
			defer r.wg.Done()
			b, err := net.Dial("tcp", r.target)
			if err != nil {
				_ = a.Close()
				return
			}
			if !r.track(a, b) {
				return
			}
			r.wg.Add(2)
			go r.pass(r.up, a, b)
			go r.pass(r.down, b, a)
		}()
	}
}

func (r *Relay) track(a, b net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		_ = a.Close()
		_ = b.Close()
		return false
	}
	r.conns[a], r.conns[b] = struct{}{}, struct{}{}
	return true
}

func (r *Relay) untrack(c net.Conn) {
	r.mu.Lock()
	delete(r.conns, c)
	r.mu.Unlock()
	_ = c.Close()
}

type piece struct {
	b  []byte
	at time.Time // when it comes out at the far end
}

// pieceSize is small enough for the pacing of slow links to be smooth.
const pieceSize = 16 << 10

// pass reads from src, waits its turn in the bottleneck, and gives it to a
// goroutine that writes it to dst when its delay is over.
func (r *Relay) pass(d *direction, src, dst net.Conn) {
	defer r.wg.Done()
	pieces := make(chan piece, 1<<16)
	r.wg.Add(1)
	go r.deliver(d, dst, pieces)
	defer close(pieces)
	size := pieceSize
	if r.cfg.Rate == 0 {
		size = 256 << 10
	}
	buf := make([]byte, size)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			at, ok := r.enter(d, n)
			if !ok {
				return
			}
			p := piece{append(getPiece(n), buf[:n]...), at}
			select {
			case pieces <- p:
			case <-r.done:
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// enter waits for room and returns when the bytes will have passed. A delay line
// without bottleneck has no queue to wait for.
func (r *Relay) enter(d *direction, n int) (time.Time, bool) {
	now := time.Now()
	if r.cfg.Rate == 0 {
		return now.Add(r.cfg.Delay), true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for d.room < n {
		select {
		case <-r.done:
			return now, false
		default:
		}
		d.cond.Wait()
	}
	d.room -= n
	now = time.Now()
	if d.clear.Before(now) {
		d.clear = now
	}
	d.clear = d.clear.Add(time.Duration(n) * time.Second / time.Duration(r.cfg.Rate))
	out := d.clear
	time.AfterFunc(time.Until(out), func() {
		d.mu.Lock()
		d.room += n
		d.cond.Broadcast()
		d.mu.Unlock()
	})
	return out.Add(r.cfg.Delay), true
}

func (r *Relay) deliver(d *direction, dst net.Conn, pieces <-chan piece) {
	defer r.wg.Done()
	defer r.untrack(dst)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for p := range pieces {
		if wait := time.Until(p.at); wait > 0 {
			timer.Reset(wait)
			select {
			case <-timer.C:
			case <-r.done:
				return
			}
		}
		r.mu.Lock()
		silent := r.silent
		r.mu.Unlock()
		select {
		case <-silent:
		case <-r.done:
			return
		}
		_, err := dst.Write(p.b)
		r.bytes.Add(int64(len(p.b)))
		putPiece(p.b)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// The rest is swallowed, so that the reader of pass is not stuck.
			for p := range pieces {
				putPiece(p.b)
			}
			return
		}
	}
}

var piecePool sync.Pool

func getPiece(n int) []byte {
	if b, ok := piecePool.Get().(*[]byte); ok && cap(*b) >= n {
		return (*b)[:0]
	}
	return make([]byte, 0, max(n, 16<<10))
}

func putPiece(b []byte) { piecePool.Put(&b) }
