package bucketfs

import (
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"

	"github.com/postern-dev/postern/agentd/attach/bucket"
	"github.com/postern-dev/postern/proto"
)

// faults stands between mountd's side and agentd's: it fails requests, in several ways.
type faults struct {
	next http.Handler

	mu   sync.Mutex
	rate float64 // how many of all requests break the connection, before or in the body
	down bool    // every one does
	deny string  // operation that is refused for good
	n    int     // requests
}

func (f *faults) set(rate float64, down bool, deny string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rate, f.down, f.deny = rate, down, deny
}

func (f *faults) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.n
}

// ServeHTTP implements http.Handler.
func (f *faults) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.n++
	bad, down, deny, late := rand.Float64() < f.rate, f.down, f.deny, rand.Float64() < 0.5
	f.mu.Unlock()
	op := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	switch {
	case op == deny:
		proto.WriteHTTPError(w, proto.Errorf(proto.CodePolicyDenied, "refused for the test"))
	case down:
		panic(http.ErrAbortHandler)
	case bad && late && op == "read":
		f.next.ServeHTTP(&cut{ResponseWriter: w, left: 1000 + rand.IntN(500_000)}, r)
	case bad:
		panic(http.ErrAbortHandler)
	default:
		f.next.ServeHTTP(w, r)
	}
}

// cut breaks a connection in the midst of a body.
type cut struct {
	http.ResponseWriter
	left int
}

// Write implements io.Writer.
func (c *cut) Write(b []byte) (int, error) {
	if c.left -= len(b); c.left < 0 {
		panic(http.ErrAbortHandler)
	}
	return c.ResponseWriter.Write(b)
}

var _ bucket.Remote = (*bucket.Store)(nil)
