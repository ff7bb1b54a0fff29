package host

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Metrics are the figures of what the control plane asked; docs/metrics.md lists
// them.
type Metrics struct {
	queries  *prometheus.CounterVec
	rows     prometheus.Counter
	bytes    prometheus.Counter
	running  prometheus.Gauge
	duration prometheus.Histogram
}

// NewMetrics registers them; nil registers nowhere.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		queries:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "agentd_queries_total", Help: "Statements that ended, by outcome."}, []string{"outcome"}),
		rows:     prometheus.NewCounter(prometheus.CounterOpts{Name: "agentd_query_rows_total", Help: "Rows that left this host."}),
		bytes:    prometheus.NewCounter(prometheus.CounterOpts{Name: "agentd_query_bytes_total", Help: "Bytes of results (Arrow) that left this host."}),
		running:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "agentd_queries_running", Help: "Statements under way."}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "agentd_query_duration_seconds", Help: "How long statements took, refused ones included.", Buckets: prometheus.ExponentialBuckets(0.001, 4, 10)}),
	}
	for _, outcome := range []string{"done", "failed", "cancelled", "denied"} {
		m.queries.WithLabelValues(outcome)
	}
	if reg != nil {
		reg.MustRegister(m.queries, m.rows, m.bytes, m.running, m.duration)
	}
	return m
}

func (m *Metrics) queryBegan() { m.running.Inc() }
func (m *Metrics) queryLeft()  { m.running.Dec() }

func (m *Metrics) queryEnded(outcome string, o *posternv1.QueryOutcome, took time.Duration) {
	m.queries.WithLabelValues(outcome).Inc()
	m.rows.Add(float64(o.GetRows()))
	m.bytes.Add(float64(o.GetBytes()))
	m.duration.Observe(took.Seconds())
}
