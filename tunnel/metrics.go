package tunnel

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are the tunnel's numbers; one Metrics serves all tunnels of a process.
//
//	postern_tunnel_tunnels                          tunnels that live
//	postern_tunnel_lanes{class}                     lanes that live
//	postern_tunnel_lanes_total{class}               lanes ever
//	postern_tunnel_streams_total{class,side}        streams opened; side: local, peer
//	postern_tunnel_streams_refused_total            streams of the peer over the limit
//	postern_tunnel_received_bytes_total{class}      bytes below the WebSocket
//	postern_tunnel_sent_bytes_total{class}
//	postern_tunnel_rtt_seconds                      round trips of new tunnels
//	postern_tunnel_handshake_failures_total{reason} see handshakeReason
//	postern_tunnel_ended_total{cause}               see causeLabel
type Metrics struct {
	tunnels        prometheus.Gauge
	lanes          *prometheus.GaugeVec
	lanesTotal     *prometheus.CounterVec
	streams        *prometheus.CounterVec
	streamsRefused prometheus.Counter
	rx, tx         *prometheus.CounterVec
	rtt            prometheus.Histogram
	handshakes     *prometheus.CounterVec
	ended          *prometheus.CounterVec

	byClass [3]classMetrics
}

type classMetrics struct {
	lanes                   prometheus.Gauge
	lanesTotal              prometheus.Counter
	streamsPeer, streamsOwn prometheus.Counter
	rx, tx                  prometheus.Counter
}

// NewMetrics makes the metrics and registers them. A nil registerer keeps them
// unregistered.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	const ns = "postern_tunnel"
	name := func(n string) string { return ns + "_" + n }
	m := &Metrics{
		tunnels:        prometheus.NewGauge(prometheus.GaugeOpts{Name: name("tunnels"), Help: "Tunnels that live."}),
		lanes:          prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name("lanes"), Help: "Lanes that live."}, []string{"class"}),
		lanesTotal:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("lanes_total"), Help: "Lanes made."}, []string{"class"}),
		streams:        prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("streams_total"), Help: "Streams opened."}, []string{"class", "side"}),
		streamsRefused: prometheus.NewCounter(prometheus.CounterOpts{Name: name("streams_refused_total"), Help: "Streams of peers reset because of the limit."}),
		rx:             prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("received_bytes_total"), Help: "Bytes received below the WebSocket."}, []string{"class"}),
		tx:             prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("sent_bytes_total"), Help: "Bytes sent below the WebSocket."}, []string{"class"}),
		rtt: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: name("rtt_seconds"), Help: "Round trip of new tunnels.",
			Buckets: []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2},
		}),
		handshakes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("handshake_failures_total"), Help: "Lanes that failed before they were up."}, []string{"reason"}),
		ended:      prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("ended_total"), Help: "Tunnels ended, by cause."}, []string{"cause"}),
	}
	for c := Control; c <= Solo; c++ {
		m.byClass[c] = classMetrics{
			lanes:       m.lanes.WithLabelValues(c.String()),
			lanesTotal:  m.lanesTotal.WithLabelValues(c.String()),
			streamsPeer: m.streams.WithLabelValues(c.String(), "peer"),
			streamsOwn:  m.streams.WithLabelValues(c.String(), "local"),
			rx:          m.rx.WithLabelValues(c.String()),
			tx:          m.tx.WithLabelValues(c.String()),
		}
	}
	if reg != nil {
		reg.MustRegister(m.tunnels, m.lanes, m.lanesTotal, m.streams, m.streamsRefused, m.rx, m.tx, m.rtt, m.handshakes, m.ended)
	}
	return m
}

func noMetrics() *Metrics { return NewMetrics(nil) }

// handshakeReason is the closed set of reasons for failed handshakes.
type handshakeReason string

const (
	failBusy     handshakeReason = "busy"     // too many handshakes at once
	failUpgrade  handshakeReason = "upgrade"  // no WebSocket request
	failTLS      handshakeReason = "tls"      // inner TLS
	failALPN     handshakeReason = "alpn"     // inner TLS without postern/1
	failTimeout  handshakeReason = "timeout"  // any step took too long
	failHello    handshakeReason = "hello"    // hello missing or malformed
	failRefused  handshakeReason = "refused"  // hello understood and refused
	failInternal handshakeReason = "internal" // ours
)

func (m *Metrics) handshakeFailed(r handshakeReason) {
	m.handshakes.WithLabelValues(string(r)).Inc()
}

func (m *Metrics) tunnelUp(rtt time.Duration) {
	m.tunnels.Inc()
	m.rtt.Observe(rtt.Seconds())
}

func (m *Metrics) tunnelEnded(cause error) {
	m.tunnels.Dec()
	m.ended.WithLabelValues(causeLabel(cause)).Inc()
}

// causeLabel is the closed set of causes of a tunnel's end.
func causeLabel(err error) string {
	for _, c := range []struct {
		err   error
		label string
	}{
		{ErrSilent, "silent"},
		{ErrReplaced, "replaced"},
		{ErrRevoked, "revoked"},
		{ErrDrained, "drained"},
		{ErrPeerClosed, "peer_closed"},
		{ErrProtocol, "protocol"},
		{ErrLost, "lost"},
	} {
		if errors.Is(err, c.err) {
			return c.label
		}
	}
	return "closed"
}

func (m *Metrics) laneUp(c Class) {
	m.byClass[c].lanes.Inc()
	m.byClass[c].lanesTotal.Inc()
}

func (m *Metrics) laneDown(c Class) { m.byClass[c].lanes.Dec() }

func (m *Metrics) streamOpened(c Class, peer bool) {
	if peer {
		m.byClass[c].streamsPeer.Inc()
	} else {
		m.byClass[c].streamsOwn.Inc()
	}
}

// moved adds the bytes that a lane moved since the last call.
func (m *Metrics) moved(l *lane) {
	rx, tx := l.ws.wire.rx.Load(), l.ws.wire.tx.Load()
	l.counted.Lock()
	defer l.counted.Unlock()
	m.byClass[l.class].rx.Add(float64(rx - l.countedRx))
	m.byClass[l.class].tx.Add(float64(tx - l.countedTx))
	l.countedRx, l.countedTx = rx, tx
}
