package pgproxy

import (
	"errors"
	"io"
	"sync"
)

// Window is how many bytes of the client's may be on their way to a Proxy: what was
// given to Feed and not told of in a Credit frame.
const Window = 256 << 10

// creditStep is how many bytes are taken before agentd is told.
const creditStep = 64 << 10

// errFlood is returned by Feed when agentd sends more than the window.
var errFlood = errors.New("more than the window was sent")

// input is what the client has sent and the proxy has not looked at yet: at most
// Window bytes.
type input struct {
	mu     sync.Mutex
	buf    []byte // r..w are waiting
	r, w   int
	closed bool
	// wake has room for one: something came.
	wake chan struct{}
}

func newInput() *input { return &input{wake: make(chan struct{}, 1)} }

// feed appends a copy of p.
func (in *input) feed(p []byte) error {
	in.mu.Lock()
	if in.r == in.w {
		in.r, in.w = 0, 0
		if cap(in.buf) > creditStep {
			in.buf = nil // an idle session is small
		}
	}
	if in.w-in.r+len(p) > Window {
		in.mu.Unlock()
		return errFlood
	}
	if in.r > 0 && in.w+len(p) > cap(in.buf) {
		in.w = copy(in.buf, in.buf[in.r:in.w])
		in.r = 0
	}
	in.buf = append(in.buf[:in.w], p...)
	in.w = len(in.buf)
	in.mu.Unlock()
	in.poke()
	return nil
}

func (in *input) poke() {
	select {
	case in.wake <- struct{}{}:
	default:
	}
}

// close says that nothing more comes.
func (in *input) close() {
	in.mu.Lock()
	in.closed = true
	in.mu.Unlock()
	in.poke()
}

// take copies what is there, at most len(p); 0 when nothing is, io.EOF at the end.
func (in *input) take(p []byte) (int, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	n := copy(p, in.buf[in.r:in.w])
	in.r += n
	if n == 0 && in.closed && len(p) > 0 {
		return 0, io.EOF
	}
	return n, nil
}

// putBack undoes the last take of p.
func (in *input) putBack(p []byte) {
	if len(p) == 0 {
		return
	}
	in.mu.Lock()
	in.buf = append(append([]byte(nil), p...), in.buf[in.r:in.w]...)
	in.r, in.w = 0, len(in.buf)
	in.mu.Unlock()
	in.poke()
}
