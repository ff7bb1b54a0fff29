package tunnel

import (
	"errors"
	"fmt"
)

var (
	// ErrClosed is the cause of a tunnel that its own side closed without
	// giving another one.
	ErrClosed = errors.New("tunnel closed")
	// ErrPeerClosed is the cause of a tunnel that the other side closed.
	ErrPeerClosed = errors.New("tunnel closed by the peer")
	// ErrSilent is the cause of a tunnel on which no byte arrived for
	// Config.DeadAfter although the peer was asked for one.
	ErrSilent = errors.New("tunnel silent: the peer or the path stopped answering")
	// ErrReplaced is the cause of a tunnel whose place a newer tunnel of the
	// same agent took. The peer learns it.
	ErrReplaced = errors.New("tunnel replaced by a newer one of the same agent")
	// ErrRevoked is the cause of a tunnel whose agent may no longer connect.
	// The peer learns it.
	ErrRevoked = errors.New("tunnel ended: the agent's identity was revoked")
	// ErrDrained is the cause of a tunnel that outlived the deadline of a
	// go-away. The peer learns it.
	ErrDrained = errors.New("tunnel drained: the go-away deadline passed")
	// ErrLost is the cause of a tunnel or lane whose connection broke.
	ErrLost = errors.New("connection lost")
	// ErrProtocol is the cause of a tunnel or lane on which the peer broke the
	// protocol of spec.md.
	ErrProtocol = errors.New("the peer broke the tunnel protocol")
	// ErrStreamReset is returned by a stream that the peer refused or reset,
	// for example because it holds Config.MaxStreams already.
	ErrStreamReset = errors.New("stream reset by the peer")
	// ErrPeerGone is returned by writes to a stream that the peer has closed.
	ErrPeerGone = errors.New("write: stream closed by the peer")
	// ErrTooManyStreams is returned by Open when the tunnel holds
	// Config.MaxStreams streams of this side. Retry when one was closed.
	ErrTooManyStreams = errors.New("too many open streams")
)

// Step is the step of a dial that failed.
type Step string

// The steps of a dial in their order.
const (
	StepConfig   Step = "config"
	StepUplink   Step = "uplink" // what makes the connections, see DialConfig.Carrier
	StepDNS      Step = "dns"
	StepTCP      Step = "tcp"
	StepProxy    Step = "proxy"
	StepOuterTLS Step = "outer tls"
	StepUpgrade  Step = "upgrade"
	StepInnerTLS Step = "inner tls"
	StepHello    Step = "hello"
)

// DialError is returned by Dial. It says which step failed, why and what to do.
// It never holds credentials.
type DialError struct {
	Step    Step
	Target  string      // host:port or URL without credentials
	Hint    string      // what to do; may be empty
	Refusal RefusalCode // RefusedNot unless the acceptor answered the hello with a refusal
	Status  int         // HTTP status of the proxy or the upgrade; 0 if there was none
	Err     error
}

// Error is one line: what failed, where, why, what to do.
func (e *DialError) Error() string {
	s := fmt.Sprintf("dial tunnel: %s %s: %v", e.Step, e.Target, e.Err)
	if e.Hint != "" {
		s += "; " + e.Hint
	}
	return s
}

// Unwrap returns the cause.
func (e *DialError) Unwrap() error { return e.Err }

// FailedStep returns the step at which a dial failed, or "" if err is no
// DialError.
func FailedStep(err error) Step {
	var d *DialError
	if errors.As(err, &d) {
		return d.Step
	}
	return ""
}

// laneError is what the streams of a lost lane return. It says that the lane is
// gone, not the stream alone.
type laneError struct {
	class Class
	cause error
}

func (e *laneError) Error() string   { return fmt.Sprintf("%s lane: %v", e.class, e.cause) }
func (e *laneError) Unwrap() error   { return e.cause }
func (e *laneError) Timeout() bool   { return false }
func (e *laneError) Temporary() bool { return false }
