package peer

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/postern-dev/postern/proto"
)

// kind is what is forwarded.
type kind string

const (
	streams kind = "stream"
	lanes   kind = "lane"
	calls   kind = "call"
)

// Metrics count what is forwarded. A nil Metrics counts nothing.
type Metrics struct{ requests *prometheus.CounterVec }

// NewMetrics registers the metrics of forwarding.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{requests: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "controlplane_peer_requests_total", Help: "Streams, lanes and calls sent to (out) and served for (in) other replicas, by result.",
	}, []string{"kind", "direction", "result"})}
	for _, k := range []kind{streams, lanes, calls} {
		for _, direction := range []string{"in", "out"} {
			for _, result := range []string{"ok", "gone", "failed"} {
				m.requests.WithLabelValues(string(k), direction, result)
			}
		}
	}
	r.MustRegister(m.requests)
	return m
}

func (m *Metrics) forwarded(k kind, err error) { m.count(k, "out", err) }
func (m *Metrics) served(k kind, err error)    { m.count(k, "in", err) }

func (m *Metrics) count(k kind, direction string, err error) {
	if m == nil {
		return
	}
	result := "ok"
	switch {
	case err == nil:
	case proto.CodeOf(err) == proto.CodeAgentOffline, proto.CodeOf(err) == proto.CodeNotFound:
		result = "gone"
	default:
		result = "failed"
	}
	m.requests.WithLabelValues(string(k), direction, result).Inc()
}
