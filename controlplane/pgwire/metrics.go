package pgwire

import "github.com/prometheus/client_golang/prometheus"

// How connections that got no session ended: label values of a metric.
const (
	reasonNoise       = "noise"       // no PostgreSQL client
	reasonHungUp      = "hung_up"     // gone before it had authenticated, psql that asks for a password say
	reasonSlow        = "slow"        // not authenticated in time
	reasonCrowd       = "crowd"       // too many strangers
	reasonTLS         = "tls"         // handshake failed, or none where it has to be
	reasonProtocol    = "protocol"    // a message that makes no sense
	reasonRefused     = "refused"     // a setting or a kind of connection that is not allowed
	reasonPassword    = "password"    // no such token of that name
	reasonRole        = "role"        // the token's role
	reasonLimit       = "limit"       // too many sessions or connections a second
	reasonSource      = "source"      // no such data source
	reasonAgent       = "agent"       // offline, or it went away
	reasonHost        = "host"        // the host or the database refused
	reasonUnavailable = "unavailable" // this control plane is stopping or cannot write
)

// Metrics counts connections. A nil Metrics counts nothing.
type Metrics struct {
	sessions  prometheus.Gauge
	strangers prometheus.Gauge
	opened    prometheus.Counter
	failed    *prometheus.CounterVec
	cancels   *prometheus.CounterVec
	in, out   prometheus.Counter
}

// NewMetrics registers the metrics of this package.
func NewMetrics(r prometheus.Registerer) *Metrics {
	bytes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "controlplane_pgwire_bytes_total", Help: "Bytes of PostgreSQL's protocol, by direction.",
	}, []string{"direction"})
	m := &Metrics{
		sessions:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "controlplane_pgwire_sessions", Help: "Sessions of PostgreSQL clients."}),
		strangers: prometheus.NewGauge(prometheus.GaugeOpts{Name: "controlplane_pgwire_strangers", Help: "Connections of PostgreSQL clients that have not authenticated."}),
		opened:    prometheus.NewCounter(prometheus.CounterOpts{Name: "controlplane_pgwire_sessions_total", Help: "Sessions that were opened."}),
		failed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "controlplane_pgwire_refused_total", Help: "Connections that got no session, by reason.",
		}, []string{"reason"}),
		cancels: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "controlplane_pgwire_cancels_total", Help: "Cancel requests, by result.",
		}, []string{"result"}),
		in: bytes.WithLabelValues("in"), out: bytes.WithLabelValues("out"),
	}
	r.MustRegister(m.sessions, m.strangers, m.opened, m.failed, m.cancels, bytes)
	return m
}

func (m *Metrics) session(change float64) {
	if m != nil {
		m.sessions.Add(change)
		if change > 0 {
			m.opened.Inc()
		}
	}
}

func (m *Metrics) stranger(change float64) {
	if m != nil {
		m.strangers.Add(change)
	}
}

func (m *Metrics) refused(reason string) {
	if m != nil {
		m.failed.WithLabelValues(reason).Inc()
	}
}

func (m *Metrics) cancel(result string) {
	if m != nil {
		m.cancels.WithLabelValues(result).Inc()
	}
}

func (m *Metrics) received(n int) {
	if m != nil {
		m.in.Add(float64(n))
	}
}

func (m *Metrics) sent(n int) {
	if m != nil {
		m.out.Add(float64(n))
	}
}
