package hub

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/postern-dev/postern/tunnel"
)

// Metrics counts links. A nil Metrics counts nothing.
type Metrics struct {
	online prometheus.Gauge
	up     prometheus.Counter
	ends   *prometheus.CounterVec
}

// NewMetrics registers the hub's metrics.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		online: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "controlplane_agents_online", Help: "Agents with a tunnel to this process.",
		}),
		up: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "controlplane_agent_attaches_total", Help: "Tunnels that said hello.",
		}),
		ends: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "controlplane_agent_detaches_total", Help: "Attached tunnels that ended, by cause.",
		}, []string{"cause"}),
	}
	r.MustRegister(m.online, m.up, m.ends)
	return m
}

func (m *Metrics) attached(online int) {
	if m == nil {
		return
	}
	m.online.Set(float64(online))
	m.up.Inc()
}

func (m *Metrics) detached(online int, cause error) {
	if m == nil {
		return
	}
	m.online.Set(float64(online))
	m.ends.WithLabelValues(causeLabel(cause)).Inc()
}

// causeLabel maps a tunnel's end to one of a few words.
func causeLabel(cause error) string {
	switch {
	case errors.Is(cause, ErrReplaced):
		return "replaced"
	case errors.Is(cause, ErrStopping):
		return "stopping"
	case errors.Is(cause, ErrRevoked), errors.Is(cause, ErrDisabled):
		return "revoked"
	case errors.Is(cause, tunnel.ErrSilent):
		return "silent"
	}
	return "lost"
}
