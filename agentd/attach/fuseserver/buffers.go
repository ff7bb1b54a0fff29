package fuseserver

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// buffers lends room for one request or reply each. Its memory is populated and not the
// garbage collector's: a process that is killed while the kernel writes a request into a
// page that is not there yet takes no page fault any more, and the kernel then answers
// the request with EIO instead of keeping it for the next server.
type buffers struct {
	size int
	mu   sync.Mutex
	free [][]byte
}

// maxFree is how many buffers are kept for later.
const maxFree = 8

func (b *buffers) get() ([]byte, error) {
	b.mu.Lock()
	if n := len(b.free); n > 0 {
		buf := b.free[n-1]
		b.free = b.free[:n-1]
		b.mu.Unlock()
		return buf, nil
	}
	b.mu.Unlock()
	buf, err := unix.Mmap(-1, 0, b.size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("no memory for requests: %w", err)
	}
	return buf, nil
}

func (b *buffers) put(buf []byte) {
	b.mu.Lock()
	if len(b.free) < maxFree {
		b.free = append(b.free, buf)
		b.mu.Unlock()
		return
	}
	b.mu.Unlock()
	_ = unix.Munmap(buf)
}

func (b *buffers) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, buf := range b.free {
		_ = unix.Munmap(buf)
	}
	b.free = nil
}
