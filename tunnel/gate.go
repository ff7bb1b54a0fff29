package tunnel

import (
	"context"
	"slices"
	"sync"
	"time"
)

// gate bounds the handshakes under way, in total and per address. A few more may
// wait for their turn, in order, so that a fleet that comes back at once gets
// through; nobody waits longer than gateWait.
type gate struct {
	total, perIP int

	mu    sync.Mutex
	n     int
	ips   map[string]int
	waits map[string]int
	queue []*waiter
}

type waiter struct {
	ip string
	ok chan struct{}
}

const (
	gateWait = 8 * time.Second
	// gateQueue is how many may wait, as a multiple of the handshakes under way;
	// one address may take half.
	gateQueue = 16
)

// enter takes a place; false means that there was none in time.
func (g *gate) enter(ctx context.Context, ip string) bool {
	g.mu.Lock()
	if g.n < g.total && g.ips[ip] < g.perIP {
		g.takeLocked(ip)
		g.mu.Unlock()
		return true
	}
	if len(g.queue) >= gateQueue*g.total || g.waits[ip] >= gateQueue*g.total/2 {
		g.mu.Unlock()
		return false
	}
	w := &waiter{ip, make(chan struct{})}
	g.queue = append(g.queue, w)
	g.waits[ip]++
	g.mu.Unlock()
	timer := time.NewTimer(gateWait)
	defer timer.Stop()
	select {
	case <-w.ok:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-w.ok: // just now
		return true
	default:
	}
	g.unqueueLocked(slices.Index(g.queue, w))
	return false
}

func (g *gate) takeLocked(ip string) {
	g.n++
	g.ips[ip]++
}

func (g *gate) unqueueLocked(i int) {
	w := g.queue[i]
	g.queue = slices.Delete(g.queue, i, i+1)
	if g.waits[w.ip]--; g.waits[w.ip] == 0 {
		delete(g.waits, w.ip)
	}
}

// leave gives a place back, to the first who waits and may have it.
func (g *gate) leave(ip string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.n--
	if g.ips[ip]--; g.ips[ip] == 0 {
		delete(g.ips, ip)
	}
	for i, w := range g.queue {
		if g.ips[w.ip] < g.perIP {
			g.unqueueLocked(i)
			g.takeLocked(w.ip)
			close(w.ok)
			return
		}
	}
}
