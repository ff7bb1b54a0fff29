package query

import (
	"github.com/prometheus/client_golang/prometheus"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Metrics counts queries. A nil Metrics counts nothing.
type Metrics struct {
	running prometheus.Gauge
	total   *prometheus.CounterVec
	rows    prometheus.Counter
	bytes   prometheus.Counter
	seconds prometheus.Histogram
}

// NewMetrics registers the metrics of queries.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		running: prometheus.NewGauge(prometheus.GaugeOpts{Name: "controlplane_queries_running", Help: "Queries under way."}),
		total: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "controlplane_queries_total", Help: "Queries that ended, by state.",
		}, []string{"state"}),
		rows:  prometheus.NewCounter(prometheus.CounterOpts{Name: "controlplane_query_rows_total", Help: "Rows of ended queries."}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{Name: "controlplane_query_bytes_total", Help: "Bytes of the results of ended queries."}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "controlplane_query_duration_seconds", Help: "From request to last row.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800},
		}),
	}
	r.MustRegister(m.running, m.total, m.rows, m.bytes, m.seconds)
	return m
}

func (m *Metrics) started() {
	if m != nil {
		m.running.Inc()
	}
}

func (m *Metrics) stopped() {
	if m != nil {
		m.running.Dec()
	}
}

func (m *Metrics) finished(q *posternv1.Query) {
	if m == nil {
		return
	}
	m.running.Dec()
	m.told(q)
}

// told counts a query that has ended and may never have been counted as running.
func (m *Metrics) told(q *posternv1.Query) {
	if m == nil {
		return
	}
	m.total.WithLabelValues(q.State).Inc()
	m.rows.Add(float64(q.Rows))
	m.bytes.Add(float64(q.Bytes))
	m.seconds.Observe(q.Duration.AsDuration().Seconds())
}
