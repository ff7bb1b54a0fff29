package budget

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"
)

// Free is what a body may have without being counted, in bytes.
const Free = 32 << 10

// ErrFull is returned by the body of a request for which there was no room in time.
var ErrFull = errors.New("too many large requests at once: try again in a moment")

// Config is how much there is.
type Config struct {
	// Total and Each bound the bytes of bodies under way, of all peers and of one. Total is at least Each.
	Total, Each int64
	// Largest is what a body of unknown length counts as, and is cut off at. It is at most Each.
	Largest int64
	// Wait is how long a body waits for room, and Read how long one that has it may take to come: else a
	// peer would hold it for ever.
	Wait, Read time.Duration
}

// Budget is memory for bodies.
type Budget struct {
	cfg Config

	mu      sync.Mutex // guards what follows; held for memory only
	used    int64
	by      map[string]int64
	changed chan struct{} // closed whenever something is given back
}

// New returns a budget.
func New(cfg Config) *Budget {
	return &Budget{cfg: cfg, by: map[string]int64{}, changed: make(chan struct{})}
}

// Used is how many bytes are taken.
func (b *Budget) Used() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}

// take waits for n bytes for a peer.
func (b *Budget) take(ctx context.Context, peer string, n int64) error {
	timer := time.NewTimer(b.cfg.Wait)
	defer timer.Stop()
	for {
		b.mu.Lock()
		if b.used+n <= b.cfg.Total && b.by[peer]+n <= b.cfg.Each {
			b.used += n
			b.by[peer] += n
			b.mu.Unlock()
			return nil
		}
		changed := b.changed
		b.mu.Unlock()
		select {
		case <-changed:
		case <-timer.C:
			return ErrFull
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (b *Budget) give(peer string, n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= n
	if b.by[peer] -= n; b.by[peer] == 0 {
		delete(b.by, peer)
	}
	close(b.changed)
	b.changed = make(chan struct{})
}

// Guard counts the bodies of requests until next has returned. A body that says its length counts as that, another one,
// once it has more than Free bytes, as the largest. peer names who asks. A streaming answer's body is read before
// it, and given back when it ends: guard procedures whose streams are short, or whose requests are small.
func (b *Budget) Guard(next http.Handler, peer func(*http.Request) string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Body == nil || r.Body == http.NoBody || r.ContentLength >= 0 && r.ContentLength <= Free {
			next.ServeHTTP(w, r)
			return
		}
		body := &body{ReadCloser: r.Body, budget: b, ctx: r.Context(), peer: peer(r), length: r.ContentLength, control: http.NewResponseController(w)}
		defer body.done()
		clone := *r
		clone.Body = body
		next.ServeHTTP(w, &clone)
	})
}

// body is a body that takes what it needs before it is read.
type body struct {
	io.ReadCloser
	budget  *Budget
	ctx     context.Context
	peer    string
	length  int64
	control *http.ResponseController

	read  int64
	taken int64
	err   error
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	if b.taken == 0 {
		if left := Free - b.read; left > 0 && b.length < 0 {
			p = p[:min(int64(len(p)), left)]
		} else if b.err = b.admit(); b.err != nil {
			return 0, b.err
		}
	}
	n, err := b.ReadCloser.Read(p)
	if b.read += int64(n); b.read > b.budget.cfg.Largest {
		err = errors.New("the request has more bytes than any may have")
	}
	if err != nil {
		b.err = err
	}
	return n, err
}

// admit takes what the body may need.
func (b *body) admit() error {
	n := b.length
	if n < 0 || n > b.budget.cfg.Largest { // cut off there
		n = b.budget.cfg.Largest
	}
	if err := b.budget.take(b.ctx, b.peer, n); err != nil {
		return err
	}
	b.taken = n
	b.control.SetReadDeadline(time.Now().Add(b.budget.cfg.Read)) //nolint:errcheck // a test's recorder knows no deadlines
	return nil
}

func (b *body) done() {
	if b.taken > 0 {
		b.budget.give(b.peer, b.taken)
		b.control.SetReadDeadline(time.Time{}) //nolint:errcheck // as above
	}
}
