package tunnel

import (
	"runtime/debug"
	"time"
)

// A fleet that comes at once leaves the garbage of its handshakes, more than what
// its idle tunnels need, and an idle process keeps it: the collector waits for the
// heap to double. So after so many arrivals and then so long none, tidy up once.
const (
	tidyAfter = 500
	tidyQuiet = 10 * time.Second
)

// ticking is a tunnel and when to look after it next.
type ticking struct {
	next time.Duration
	t    *Tunnel
}

// startTicking takes a tunnel into the care of the one goroutine that drives all
// tunnels while there are any.
func (s *Server) startTicking(t *Tunnel) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fresh = append(s.fresh, ticking{clock() + s.cfg.tickEvery(), t})
	s.arrived++
	if s.ticking || s.closed {
		return
	}
	s.ticking = true
	s.wg.Add(1)
	go s.tickLoop()
}

func (s *Server) tickLoop() {
	defer s.wg.Done()
	every := s.cfg.tickEvery()
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	var all []ticking
	var w watch
	var arrived int
	var quiet time.Duration // clock when arrived last changed
	for {
		select {
		case <-s.closing:
			return
		case <-ticker.C:
		}
		s.mu.Lock()
		all = append(all, s.fresh...)
		s.fresh = s.fresh[:0]
		if len(all) == 0 {
			s.ticking, s.fresh = false, nil
			s.mu.Unlock()
			return
		}
		now := clock()
		if s.arrived != arrived {
			arrived, quiet = s.arrived, now
		}
		if arrived >= tidyAfter && now-quiet >= tidyQuiet {
			s.arrived, arrived = 0, 0
			s.wg.Go(debug.FreeOSMemory)
		}
		s.mu.Unlock()
		w.tick(now, every)
		keep := all[:0]
		for _, x := range all {
			if x.next <= now+every/4 {
				if x.next = x.t.tick(now, w.woke); x.t.Err() != nil {
					continue
				}
			}
			keep = append(keep, x)
		}
		clear(all[len(keep):])
		all = keep
	}
}
