package tunnel

import (
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// The credit of bulk follows the path: little queue on a slow one, no loss of rate
// on a fast one, whatever the processor adds to the round trips.
func TestWindowsFollowThePath(t *testing.T) {
	type path struct {
		name    string
		rate    float64 // bytes per second
		rtt     time.Duration
		noise   time.Duration // added to one ping in four
		streams int
		queue   time.Duration // allowed at the 99th percentile, after the start
		use     float64       // of the rate, at least
	}
	for _, p := range []path{
		{"100 Mbit/s, 20 ms", 12.5e6, 20 * time.Millisecond, 0, 4, 6 * time.Millisecond, 0.95},
		{"100 Mbit/s, 20 ms, busy processor", 12.5e6, 20 * time.Millisecond, 10 * time.Millisecond, 4, 10 * time.Millisecond, 0.95},
		{"10 Mbit/s, 40 ms", 1.25e6, 40 * time.Millisecond, 0, 1, 150 * time.Millisecond, 0.95},
		{"400 MB/s, 50 ms", 400e6, 50 * time.Millisecond, 0, 1, 40 * time.Millisecond, 0.9},
		{"400 MB/s, 50 ms, busy processor", 400e6, 50 * time.Millisecond, 30 * time.Millisecond, 1, 40 * time.Millisecond, 0.9},
		{"local", 1.5e9, 200 * time.Microsecond, 5 * time.Millisecond, 4, 10 * time.Millisecond, 0.95},
	} {
		t.Run(p.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := rand.New(rand.NewPCG(1, 2))
				w := &windows{left: 64 << 20}
				window := make([]float64, p.streams) // what each stream has grown to
				grown := make([]uint32, p.streams)
				seen := make([]uint32, p.streams)
				for i := range window {
					window[i] = yamuxWindowStart
				}
				var queues []time.Duration
				var moved, could float64
				for round := range 400 {
					var flight float64
					for i := range window {
						share := window[i]
						if w.share > 0 {
							share = min(share, float64(w.share))
						}
						flight += share
					}
					rtt := max(p.rtt, time.Duration(flight/p.rate*float64(time.Second)))
					speed := flight / rtt.Seconds()
					length := max(roundMin, rtt)
					time.Sleep(length)
					ping := false
					for i := range window {
						_, asked := w.consumed(int64(speed*length.Seconds()/float64(p.streams)), &seen[i], p.rtt)
						ping = ping || asked
						if (p.rtt < lanRTT || w.mayGrow(&grown[i])) && window[i]/speed*float64(p.streams) < 4*p.rtt.Seconds() {
							window[i] = min(2*window[i], maxWindow)
						}
					}
					if !ping {
						continue
					}
					measured := rtt + time.Duration(r.Int64N(int64(time.Millisecond)))
					if r.IntN(4) == 0 {
						measured += time.Duration(r.Int64N(int64(p.noise) + 1))
					}
					w.measure(measured, p.rtt)
					if round >= 60 {
						queues = append(queues, rtt-p.rtt)
						moved, could = moved+speed*length.Seconds(), could+p.rate*length.Seconds()
					}
				}
				slices.Sort(queues)
				if len(queues) == 0 {
					t.Fatal("nothing was measured")
				}
				if q := queues[len(queues)*99/100]; q > p.queue {
					t.Errorf("queue p99 %v, want at most %v", q, p.queue)
				}
				if use := moved / could; use < p.use {
					t.Errorf("%.2f of the rate, want %.2f", use, p.use)
				}
			})
		})
	}
}
