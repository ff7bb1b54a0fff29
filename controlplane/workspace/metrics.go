package workspace

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts what is done to files. A nil *Metrics counts nothing.
type Metrics struct {
	ops       prometheus.Counter
	commits   prometheus.Histogram
	watchers  prometheus.Gauge
	bulkBytes *prometheus.CounterVec
}

// NewMetrics registers the metrics.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		ops: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "controlplane_file_ops_total", Help: "Operations of hosts on workspaces that were applied or answered.",
		}),
		commits: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "controlplane_file_commit_seconds", Help: "How long a batch of operations took.", Buckets: prometheus.ExponentialBuckets(0.001, 4, 7),
		}),
		watchers: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "controlplane_file_watchers", Help: "Streams of changes that are open.",
		}),
		bulkBytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "controlplane_file_bytes_total", Help: "Bytes of contents, by who had or gave them and the way they went.",
		}, []string{"peer", "direction"}),
	}
	r.MustRegister(m.ops, m.commits, m.watchers, m.bulkBytes)
	return m
}

func (m *Metrics) committed(ops int, took time.Duration) {
	if m != nil {
		m.ops.Add(float64(ops))
		m.commits.Observe(took.Seconds())
	}
}

func (m *Metrics) watching(by float64) {
	if m != nil {
		m.watchers.Add(by)
	}
}

// moved counts bytes; peer is "agent" or "user", direction "in" or "out".
func (m *Metrics) moved(peer, direction string, n int) {
	if m != nil {
		m.bulkBytes.WithLabelValues(peer, direction).Add(float64(n))
	}
}
