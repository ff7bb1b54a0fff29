package bucket

import "github.com/prometheus/client_golang/prometheus"

// operations are what a bucket may be asked; they are labels of metrics.
var operations = []string{"head", "list", "read", "write", "copy", "delete"}

// Metrics are the figures of what mounts ask of buckets, all together; docs/metrics.md lists
// them. A nil one counts nothing.
type Metrics struct {
	requests       *prometheus.CounterVec
	received, sent prometheus.Counter
}

// NewMetrics registers them.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "agentd_bucket_requests_total", Help: "What mounts asked of buckets, by how it ended."}, []string{"operation", "result"}),
		received: prometheus.NewCounter(prometheus.CounterOpts{Name: "agentd_bucket_received_bytes_total", Help: "Bytes of objects that mounts got from buckets."}),
		sent:     prometheus.NewCounter(prometheus.CounterOpts{Name: "agentd_bucket_sent_bytes_total", Help: "Bytes of objects that buckets took from mounts."}),
	}
	for _, operation := range operations {
		for _, result := range []string{"done", "missing", "failed"} {
			m.requests.WithLabelValues(operation, result)
		}
	}
	reg.MustRegister(m.requests, m.received, m.sent)
	return m
}

// ended counts a request of one of operations.
func (m *Metrics) ended(operation string, err error) {
	if m == nil {
		return
	}
	result := "done"
	switch {
	case NotFound(err):
		result = "missing"
	case err != nil:
		result = "failed"
	}
	m.requests.WithLabelValues(operation, result).Inc()
}

func (m *Metrics) got(n int64) {
	if m != nil && n > 0 {
		m.received.Add(float64(n))
	}
}

func (m *Metrics) took(n int64) {
	if m != nil && n > 0 {
		m.sent.Add(float64(n))
	}
}
