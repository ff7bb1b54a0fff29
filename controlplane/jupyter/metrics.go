package jupyter

import "github.com/prometheus/client_golang/prometheus"

// Metrics counts. A nil Metrics counts nothing.
type Metrics struct {
	connections prometheus.Gauge
	opened      prometheus.Counter
	in, out     prometheus.Counter
	lost        prometheus.Counter
}

// NewMetrics registers the metrics of this package.
func NewMetrics(r prometheus.Registerer) *Metrics {
	messages := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "controlplane_jupyter_messages_total", Help: "Messages on kernels' WebSockets, by direction.",
	}, []string{"direction"})
	m := &Metrics{
		connections: prometheus.NewGauge(prometheus.GaugeOpts{Name: "controlplane_jupyter_connections", Help: "WebSockets to kernels."}),
		opened:      prometheus.NewCounter(prometheus.CounterOpts{Name: "controlplane_jupyter_connections_total", Help: "WebSockets to kernels that were opened."}),
		lost:        prometheus.NewCounter(prometheus.CounterOpts{Name: "controlplane_jupyter_streams_lost_total", Help: "Streams to hosts that were lost under a WebSocket, which was kept."}),
		in:          messages.WithLabelValues("in"),
		out:         messages.WithLabelValues("out"),
	}
	r.MustRegister(m.connections, m.opened, m.lost, messages)
	return m
}

func (m *Metrics) connection(change float64) {
	if m != nil {
		m.connections.Add(change)
		if change > 0 {
			m.opened.Inc()
		}
	}
}

func (m *Metrics) message(out bool) {
	switch {
	case m == nil:
	case out:
		m.out.Inc()
	default:
		m.in.Inc()
	}
}

func (m *Metrics) streamLost() {
	if m != nil {
		m.lost.Inc()
	}
}
