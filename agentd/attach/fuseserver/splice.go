package fuseserver

import (
	"errors"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Files is implemented by file systems that have what is read in files on this host: a READ of
// spliceFrom bytes or more is then answered without its bytes passing through this process. Where the
// kernel reads such files itself (OpenBacking) there are no READ requests for them.
type Files interface {
	// ReadFile gives the descriptor of a file that has all size bytes at offset of an open node,
	// here and now, valid until done; else ok is false, and Read is called. It must not wait.
	ReadFile(node uint64, offset int64, size int) (fd int, done func(), ok bool)
}

const (
	// spliceFrom is the smallest READ that is answered through a pipe, in bytes: below it the
	// two system calls more cost as much as a copy. See docs/performance.md.
	spliceFrom = 64 << 10
	// pipeSize holds a reply of the largest READ, its header, and a page more than that where
	// it does not begin at one's start.
	pipeSize = 512 << 10
	// maxPipes is how many pipes are kept for later.
	maxPipes = 8
)

// pipes lends empty pipes.
type pipes struct {
	mu   sync.Mutex
	free [][2]int
	none bool // the system gives none that are large enough
}

func (p *pipes) get() (pair [2]int, ok bool) {
	p.mu.Lock()
	if n := len(p.free); n > 0 {
		pair = p.free[n-1]
		p.free = p.free[:n-1]
		p.mu.Unlock()
		return pair, true
	}
	none := p.none
	p.mu.Unlock()
	if none || unix.Pipe2(pair[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return pair, false
	}
	if size, err := unix.FcntlInt(uintptr(pair[1]), unix.F_SETPIPE_SZ, pipeSize); err != nil || size < pipeSize {
		closePipe(pair)
		p.mu.Lock()
		p.none = true
		p.mu.Unlock()
		return pair, false
	}
	return pair, true
}

// put takes back a pipe that is empty.
func (p *pipes) put(pair [2]int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.free) >= maxPipes {
		closePipe(pair)
		return
	}
	p.free = append(p.free, pair)
}

func (p *pipes) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, pair := range p.free {
		closePipe(pair)
	}
	p.free = nil
}

func closePipe(pair [2]int) {
	_ = unix.Close(pair[0])
	_ = unix.Close(pair[1])
}

// splice answers a READ from a file, and tells whether it did; if not, nothing was answered.
func (s *Server) splice(request []byte) bool {
	if s.files == nil || opcode(request) != opRead || len(request) < inHeaderSize+20 {
		return false
	}
	size := int(native.Uint32(request[inHeaderSize+16:]))
	if size < spliceFrom || size > pipeSize/2 {
		return false
	}
	offset := int64(native.Uint64(request[inHeaderSize+8:]))
	fd, done, ok := s.files.ReadFile(native.Uint64(request[16:]), offset, size)
	if !ok {
		return false
	}
	defer done()
	pair, ok := s.pipes.get()
	if !ok {
		return false
	}
	head := refusal(unique(request), 0)
	native.PutUint32(head, uint32(len(head)+size))
	if n, err := unix.Write(pair[1], head); err != nil || n != len(head) || !fill(pair[1], fd, offset, size) {
		closePipe(pair) // with what is in it
		return false
	}
	switch err := s.conn.splice(pair[0], len(head)+size); {
	case err == nil:
		s.pipes.put(pair)
		return true
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOENT): // see reply
	default:
		s.logger.Error("spliced reply not taken by the kernel", "err", err, "bytes", size)
		s.reply(refusal(unique(request), fuse.EIO))
	}
	closePipe(pair)
	return true
}

// fill moves size bytes of a file into a pipe that has room for them. The pages stay in the page
// cache, too.
func fill(pipe, fd int, offset int64, size int) bool {
	for size > 0 {
		n, err := unix.Splice(fd, &offset, pipe, nil, size, unix.SPLICE_F_NONBLOCK)
		switch {
		case err == unix.EINTR:
		case err != nil || n <= 0: // shorter than it was, or the file system can't
			return false
		}
		size -= int(max(n, 0))
	}
	return true
}

// splice sends one message of n bytes out of a pipe.
func (c *Conn) splice(pipe, n int) error {
	var err error
	if cerr := c.raw.Control(func(fd uintptr) {
		for {
			var sent int64
			sent, err = unix.Splice(pipe, nil, int(fd), nil, n, 0)
			if err == nil && sent != int64(n) {
				err = unix.EIO
			}
			if err != unix.EINTR {
				return
			}
		}
	}); cerr != nil {
		return unix.ENODEV // closed
	}
	return err
}
