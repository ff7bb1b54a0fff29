package tunnel

import "sync"

// chunkSize is the size of the buffers that gather writes and reads. 64 KiB was
// the best trade between calls per byte and latency (a queue of 64 KiB is 5 ms
// at 100 Mbit/s); the rest leaves room for two frames of 32 KiB with their
// headers, a few link messages and the WebSocket's headers.
const chunkSize = 64<<10 + 3<<10

// chunk is a pooled buffer: data[r:n] is filled. Lanes hold chunks only while
// bytes are moving, so an idle lane costs none.
type chunk struct {
	r, n int
	data [chunkSize]byte
}

var chunks = sync.Pool{New: func() any { return new(chunk) }}

func getChunk() *chunk {
	c := chunks.Get().(*chunk)
	c.r, c.n = 0, 0
	return c
}

func putChunk(c *chunk) {
	if c != nil {
		chunks.Put(c)
	}
}

func (c *chunk) free() int { return chunkSize - c.n }

// append copies as much of p as fits and returns how much that was.
func (c *chunk) append(p []byte) int {
	n := copy(c.data[c.n:], p)
	c.n += n
	return n
}
