package child

import (
	"context"
	"sync"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
)

// Reasons to stop a statement that are the process's own.
const (
	rowLimit  frame.Reason = 'r'
	byteLimit frame.Reason = 'b'
	badValue  frame.Reason = 'v'
)

const (
	// cancelTimeout bounds the delivery of one cancel request.
	cancelTimeout = 3 * time.Second
	// cancelRepeat is the wait before a cancel request is sent again: the
	// first may have met the server between two messages of ours, when it
	// takes no notice.
	cancelRepeat = 100 * time.Millisecond
)

// statement is one statement under way, and the way to stop it. stop may be
// called from any goroutine, the rest belongs to main.
type statement struct {
	// cancel asks the database to cancel what the connection does. It returns
	// when the server has passed the request on.
	cancel func(context.Context) error

	stopped  chan struct{} // closed by the first stop
	finished chan struct{} // closed by finish
	started  time.Time

	mu      sync.Mutex
	reason  frame.Reason
	over    bool
	unclean bool
	wait    sync.WaitGroup
}

func newStatement(cancel func(context.Context) error) *statement {
	return &statement{cancel: cancel, stopped: make(chan struct{}), finished: make(chan struct{}), started: time.Now()}
}

// stop cancels the statement in the database. Only the first reason counts; a
// statement that has finished is left alone.
func (st *statement) stop(reason frame.Reason) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.over || st.reason != 0 {
		return
	}
	st.reason = reason
	close(st.stopped)
	st.wait.Add(1)
	go func() {
		defer st.wait.Done()
		for pause := cancelRepeat; ; pause = min(2*pause, cancelTimeout) {
			ctx, done := context.WithTimeout(context.Background(), cancelTimeout)
			err := st.cancel(ctx)
			done()
			st.mu.Lock()
			// A request that was not seen to arrive may arrive later and hit
			// the next statement.
			st.unclean = st.unclean || err != nil
			st.mu.Unlock()
			select {
			case <-st.finished:
				return
			case <-time.After(pause):
			}
		}
	}()
}

// stopReason is why the statement was stopped, 0 if it was not.
func (st *statement) stopReason() frame.Reason {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.reason
}

func (st *statement) isStopped() bool {
	select {
	case <-st.stopped:
		return true
	default:
		return false
	}
}

// finish ends the time in which stop has an effect. When it returns no cancel
// request is under way any more; clean tells whether all of them arrived.
func (st *statement) finish() (clean bool) {
	st.mu.Lock()
	st.over = true
	st.mu.Unlock()
	close(st.finished)
	st.wait.Wait()
	return !st.unclean
}
