package tunnel

import (
	"fmt"
	"log/slog"
	"net"
	"time"
)

// Class says how a stream wants to travel.
type Class uint8

const (
	// Control is for small messages, latency first.
	Control Class = iota
	// Bulk is for large bodies, many at once on one lane.
	Bulk
	// Solo is for one large body at a time, alone on a lane without yamux. It
	// costs a connection set-up unless an idle one is reused, and falls back to
	// Bulk when the limit of solo lanes is reached.
	Solo
)

// String returns the word used in logs and metrics.
func (c Class) String() string {
	switch c {
	case Control:
		return "control"
	case Bulk:
		return "bulk"
	case Solo:
		return "solo"
	}
	return fmt.Sprintf("class(%d)", uint8(c))
}

// Classed is implemented by every stream: those that Open returns and those
// that the Listener accepts.
type Classed interface {
	net.Conn
	// Class is the opener's choice, or Bulk for a Solo that fell back.
	Class() Class
	// Tunnel is the tunnel that carries the stream.
	Tunnel() *Tunnel
}

// Config holds what both sides may choose. Zero values mean the defaults.
type Config struct {
	Logger  *slog.Logger // nil discards
	Metrics *Metrics     // nil keeps none

	// MaxStreams is how many streams the peer may hold open at once, over all
	// lanes; more are reset. The same number bounds this side's own. Default 512.
	MaxStreams int

	// Heartbeat is how long a tunnel in use may be silent before the peer is
	// asked for a sign of life; an idle one waits three times as long, at most
	// 2/3 of DeadAfter. Default 1 s.
	Heartbeat time.Duration

	// DeadAfter is how long no byte may arrive on any lane before the tunnel
	// ends with ErrSilent. Default 4.5 s. Death is noticed at most Heartbeat/2
	// later.
	DeadAfter time.Duration

	// WindowBudget bounds the received and unread bytes of a tunnel beyond
	// 256 KiB per stream. Default 64 MiB.
	WindowBudget int64

	// MaxSolo is how many solo lanes a tunnel may have. Default 4; negative
	// means none, so that Solo streams travel as Bulk.
	MaxSolo int

	// LaneTimeout bounds the dialing of a further lane. Default 10 s.
	LaneTimeout time.Duration

	// BulkIdle is how long a bulk lane without streams is kept. Default 5 min.
	BulkIdle time.Duration

	// SoloQuiet is after how much silence a WebSocket ping passes over a solo
	// lane in use: reverse proxies commonly end a connection that is silent for
	// 60 s. Default 20 s.
	SoloQuiet time.Duration

	// TestHookConn, if not nil, may wrap the connection beneath each lane's
	// WebSocket: tests inject faults here.
	TestHookConn func(class Class, conn net.Conn) net.Conn
}

func (c Config) withDefaults() Config {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = noMetrics()
	}
	def(&c.MaxStreams, 512)
	def(&c.Heartbeat, time.Second)
	def(&c.DeadAfter, 4500*time.Millisecond)
	def(&c.WindowBudget, 64<<20)
	def(&c.MaxSolo, 4)
	def(&c.LaneTimeout, 10*time.Second)
	def(&c.BulkIdle, 5*time.Minute)
	def(&c.SoloQuiet, 20*time.Second)
	return c
}

func def[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// idleHeartbeat is the heartbeat of a tunnel without streams.
func (c *Config) idleHeartbeat() time.Duration {
	return max(c.Heartbeat, min(3*c.Heartbeat, c.DeadAfter*2/3))
}

// tickEvery is how often a tunnel looks at its liveness.
func (c *Config) tickEvery() time.Duration {
	return max(min(c.Heartbeat/2, c.DeadAfter/4), time.Millisecond)
}
