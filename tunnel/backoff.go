package tunnel

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"syscall"
	"time"
)

// BackoffConfig is how KeepUp retries. Zero values mean the defaults.
type BackoffConfig struct {
	Logger *slog.Logger // nil discards

	Min time.Duration // bound of the first wait; default 200 ms
	Max time.Duration // bound of the longest; default 30 s

	// StableAfter is how long a tunnel must live before it counts as healthy and
	// the waits start over. Default 10 s.
	StableAfter time.Duration

	// Wake, if not nil, ends a wait at once and has a live tunnel probed: send to
	// it when the network has changed (WatchNetwork does).
	Wake <-chan struct{}

	// Stop, if not nil, says which errors, of a dial or of a tunnel's end, make
	// further tries pointless. KeepUp then returns that error.
	Stop func(error) bool
}

// absentMax bounds the waits while the host answers but nothing serves there: the
// control plane is restarting. Asking is cheap then, and who asks often is back
// soon; absentFor later it is down rather than restarting.
const (
	absentMax    = 800 * time.Millisecond
	absentFor    = 5 * time.Minute
	absentMaxOld = 5 * time.Second
)

// Backoff counts failures and tells how long to wait: full jitter, that is
// anything between 0 and a bound that doubles. The zero value is not usable.
type Backoff struct {
	cfg      BackoffConfig
	failures int
	// absences are the failures in a row, since a time, at which nothing served.
	// They are no failures otherwise: a long restart must not make the wait after
	// the next one long.
	absences int
	since    time.Time
	rand     func() float64
}

// NewBackoff makes a Backoff.
func NewBackoff(cfg BackoffConfig) *Backoff {
	def(&cfg.Min, 200*time.Millisecond)
	def(&cfg.Max, 30*time.Second)
	def(&cfg.StableAfter, 10*time.Second)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Backoff{cfg: cfg, rand: rand.Float64}
}

// Next returns the next wait after a failure with err.
func (b *Backoff) Next(err error) time.Duration {
	if !absent(err) {
		b.absences = 0
		b.failures++
		if busy(err) {
			return b.wait(b.failures, busyMax)
		}
		return b.wait(b.failures, b.cfg.Max)
	}
	now := time.Now()
	if b.absences == 0 {
		b.since = now
	}
	b.absences++
	if now.Sub(b.since) < absentFor {
		return b.wait(b.absences, absentMax)
	}
	return b.wait(b.absences, absentMaxOld)
}

// busyMax bounds the waits while the control plane says that it is busy: a fleet is
// coming back, at a rate that its gate bounds, and saying no costs little.
const busyMax = 5 * time.Second

func busy(err error) bool {
	var d *DialError
	return errors.As(err, &d) && d.Step == StepUpgrade && d.Status == http.StatusServiceUnavailable
}

// wait is the wait after the nth failure.
func (b *Backoff) wait(n int, bound time.Duration) time.Duration {
	bound = min(bound, b.cfg.Max)
	if n < 32 {
		bound = min(bound, b.cfg.Min<<(n-1))
	}
	return time.Duration(b.rand() * float64(bound))
}

// absent reports that the host answers but nothing serves there: the kernel
// refuses the connection, or a reverse proxy or a forward one finds no server
// behind it (tinyproxy says 500 then, others 502 or 503).
func absent(err error) bool {
	if errors.Is(err, syscall.ECONNREFUSED) {
		return true
	}
	var d *DialError
	if !errors.As(err, &d) {
		return false
	}
	switch d.Status {
	case http.StatusBadGateway:
		return d.Step == StepUpgrade || d.Step == StepProxy
	case http.StatusInternalServerError, http.StatusServiceUnavailable:
		return d.Step == StepProxy
	}
	return false
}

// Reset forgets the failures; call it when success proved stable.
func (b *Backoff) Reset() { b.failures, b.absences = 0, 0 }

// KeepUp keeps a tunnel up until ctx ends: it dials, calls use in a goroutine for
// each new tunnel, and dials again when the tunnel is lost, after a wait that
// grows. When the peer goes away it dials the next tunnel first, lets the old
// one finish its streams and closes it when it has none left.
//
// use should return when the tunnel is done or ctx, which ends with the tunnel,
// is. An error that it returns before ends the tunnel and counts as a failure.
// KeepUp waits for all uses before it returns, with ctx's cause or the error that
// cfg.Stop picked. It logs one line per change of state.
func KeepUp(ctx context.Context, cfg BackoffConfig, dial func(context.Context) (*Tunnel, error), use func(context.Context, *Tunnel) error) error {
	k := &keeper{b: NewBackoff(cfg), dial: dial, use: use}
	k.log = k.b.cfg.Logger
	return k.run(ctx)
}

type keeper struct {
	b    *Backoff
	log  *slog.Logger
	dial func(context.Context) (*Tunnel, error)
	use  func(context.Context, *Tunnel) error

	told  string // the state that was logged last
	users []*user
}

// user is a tunnel in use.
type user struct {
	t     *Tunnel
	since time.Time
	done  chan struct{} // closed when use has returned and the tunnel is closed
	err   error         // what use returned, or the tunnel's cause
}

func (k *keeper) run(ctx context.Context) error {
	defer func() {
		for _, u := range k.users {
			_ = u.t.Close(ErrClosed)
			<-u.done
		}
	}()
	for {
		err := k.once(ctx)
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		if err == nil {
			continue // go-away: dial the next at once
		}
		if k.b.cfg.Stop != nil && k.b.cfg.Stop(err) {
			k.tell(slog.LevelError, "tunnel given up", err)
			return err
		}
		k.tell(slog.LevelWarn, "tunnel down, retrying", err)
		timer := time.NewTimer(k.b.Next(err))
		select {
		case <-timer.C:
		case <-k.b.cfg.Wake:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// once dials a tunnel and stays with it until it is lost (an error) or the peer
// goes away (nil).
func (k *keeper) once(ctx context.Context) error {
	t, err := k.dial(ctx)
	if err != nil {
		return err
	}
	u := k.start(ctx, t)
	k.tell(slog.LevelInfo, "tunnel up", nil)
	k.retireOld(u)
	stable := time.NewTimer(k.b.cfg.StableAfter)
	defer stable.Stop()
	for {
		select {
		case <-u.done:
			return u.err
		case <-stable.C:
			k.b.Reset()
		case <-k.b.cfg.Wake:
			t.Probe()
		case g := <-t.GoneAway():
			k.tell(slog.LevelInfo, "control plane is going away, moving", nil)
			timer := time.NewTimer(g.ReconnectAfter)
			defer timer.Stop()
			select {
			case <-timer.C:
			case <-u.done:
				return u.err
			case <-ctx.Done():
			}
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// start runs use for a tunnel.
func (k *keeper) start(ctx context.Context, t *Tunnel) *user {
	u := &user{t: t, since: time.Now(), done: make(chan struct{})}
	k.users = append(k.users, u)
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(closingContext{t.done}, func() { cancel(t.closedError()) })
	go func() {
		defer close(u.done)
		err := k.use(ctx, t)
		if err != nil && t.Err() == nil {
			u.err = err
			_ = t.Close(ErrClosed)
		}
		select {
		case <-t.Done():
		case <-ctx.Done():
		}
		if u.err == nil {
			u.err = t.closedError()
		}
		_ = t.Close(ErrClosed)
		stop()
		cancel(nil)
	}()
	return u
}

// retireOld closes the tunnels before u once their streams are finished, and
// forgets those that are done.
func (k *keeper) retireOld(u *user) {
	var live []*user
	for _, old := range k.users {
		select {
		case <-old.done:
			continue
		default:
		}
		live = append(live, old)
		if old == u {
			continue
		}
		go func() {
			ticker := time.NewTicker(time.Second)
			defer ticker.Stop()
			for old.t.Streams() > 0 {
				select {
				case <-ticker.C:
				case <-old.done:
					return
				}
			}
			_ = old.t.Close(ErrReplaced)
		}()
	}
	k.users = live
}

// tell logs a change of state, once.
func (k *keeper) tell(level slog.Level, state string, err error) {
	text := state
	var d *DialError
	if errors.As(err, &d) {
		text += string(d.Step) + http.StatusText(d.Status) + d.Refusal.String()
	}
	if text == k.told {
		return
	}
	k.told = text
	if err != nil {
		k.log.Log(context.Background(), level, state, "err", err)
	} else {
		k.log.Log(context.Background(), level, state)
	}
}

// Probe asks the peer for a sign of life now instead of at the next heartbeat.
func (t *Tunnel) Probe() {
	if nonce, ok := t.live.ping(100 * time.Millisecond); ok {
		_ = t.control.send(&message{typ: msgPing, nonce: nonce})
	}
}
