package replica

import (
	"context"
	"errors"
	"net"
	"syscall"
	"time"

	"github.com/postern-dev/postern/proto"
)

// triesConnected is how often a request asks again while the control plane tells of changes: what fails then is
// one call on its way while a tunnel or a control plane makes way for the next, or it fails again.
const triesConnected = 3

// retry calls do again, within ctx, while it fails for want of a link that may come: it has just been lost, or
// is coming up with this process. One that has been away for Config.Deadline fails requests at once.
func (r *Replica) retry(ctx context.Context, do func() error) error {
	wait := 25 * time.Millisecond
	for tries := 1; ; tries++ {
		err := do()
		if err == nil || ctx.Err() != nil || !passing(err) || !r.linkMayCome(tries) {
			return err
		}
		pause(ctx, wait)
		if ctx.Err() != nil {
			return err
		}
		wait = min(2*wait, 500*time.Millisecond)
	}
}

// linkMayCome tells whether to ask again after so many tries.
func (r *Replica) linkMayCome(tries int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.ctx.Err() != nil:
		return false
	case r.status.Connected:
		return tries < triesConnected
	}
	return time.Since(r.unlinked) < r.cfg.Deadline
}

// passing tells whether an error of a call may be one of the way to the control plane, not its answer or this
// host's disk.
func passing(err error) bool {
	if ofNetwork(err) {
		return true
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return false
	}
	switch proto.CodeOf(err) {
	case proto.CodeInternal, proto.CodeUnavailable, proto.CodeAgentOffline, proto.CodeAgentLost:
		return true
	}
	return false
}

// ofNetwork tells whether an error is of a socket. Its errno means nothing to who asked for a file: ENOENT is
// a socket that is not there.
func ofNetwork(err error) bool {
	var op *net.OpError
	return errors.As(err, &op)
}
