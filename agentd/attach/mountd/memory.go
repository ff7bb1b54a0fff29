package mountd

import (
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// memoryTarget is what the process takes of the host's memory, without its program, as long as
	// what it must remember has room in it, in bytes: names and attributes of some 100,000 files.
	memoryTarget = 48 << 20
	// idleMemory is how much memory that nobody uses is kept for later beyond that, in bytes.
	idleMemory = 8 << 20
	// trimEvery is how often it is given back at most: the collector runs for it.
	trimEvery = 10 * time.Second
)

// memory keeps the process near memoryTarget without collecting garbage all the time: below it the
// collector waits until there is twice as much garbage as what lives, near it it runs earlier. What
// lives moves the target: half as much again must fit.
type memory struct {
	sample  []metrics.Sample
	limit   int64
	trimmed time.Time
}

func newMemory() *memory {
	debug.SetGCPercent(200)
	m := &memory{sample: []metrics.Sample{
		{Name: "/gc/heap/live:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
		{Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/released:bytes"},
	}}
	m.tune(time.Now())
	return m
}

// tune looks at what lives; call it every few seconds.
func (m *memory) tune(now time.Time) {
	metrics.Read(m.sample)
	live, free := int64(m.sample[0].Value.Uint64()), int64(m.sample[1].Value.Uint64())
	taken := int64(m.sample[2].Value.Uint64()) - int64(m.sample[3].Value.Uint64())
	if limit := max(memoryTarget, live+live/2+12<<20); limit != m.limit {
		m.limit = limit
		debug.SetMemoryLimit(limit)
	}
	// After a burst: a listing of many names needs several times what stays of it.
	if free > idleMemory && taken > memoryTarget && now.Sub(m.trimmed) > trimEvery {
		m.trimmed = now
		debug.FreeOSMemory()
	}
}
