package workspace

import (
	"math"
	"time"
)

// thin removes versions of a file beyond what the workspace keeps: those that were
// followed long ago, and then, of those that lie closest together for their age, as many as
// are too many. The newest two and the oldest that is young enough stay.
func (t *tree) thin(n *node) error {
	if t.ws.KeepVersions == 0 && t.ws.KeepFor == 0 || n.Version < 3 {
		return nil
	}
	versions, times, err := t.tx.VersionTimes(t.ctx, n.ID)
	if err != nil {
		return err
	}
	victims := thinned(versions, times, t.now, int(t.ws.KeepVersions), t.ws.KeepFor)
	if len(victims) == 0 {
		return nil
	}
	if err := t.flush(); err != nil { // snapshots keep what they need first
		return err
	}
	return t.tx.DropVersions(t.ctx, n.ID, victims...)
}

// thinned chooses the versions that go. keep and keepFor are not looked at if zero.
func thinned(versions []uint64, times []time.Time, now time.Time, keep int, keepFor time.Duration) []uint64 {
	var victims []uint64
	drop := func(i int) {
		victims = append(victims, versions[i])
		versions = append(versions[:i:i], versions[i+1:]...)
		times = append(times[:i:i], times[i+1:]...)
	}
	for keepFor > 0 && len(versions) > 2 && now.Sub(times[1]) > keepFor { // the second replaced the first
		drop(0)
	}
	for keep > 0 && len(versions) > max(keep, 2) {
		best, least := 1, math.Inf(1)
		for i := 1; i < len(versions)-2; i++ {
			gap := times[i+1].Sub(times[i-1]).Seconds()
			age := now.Sub(times[i]).Seconds() + 1
			if weight := gap / age; weight < least {
				best, least = i, weight
			}
		}
		if best > len(versions)-3 { // no more than the ends
			best = 0
		}
		drop(best)
	}
	return victims
}
