package blob

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"gocloud.dev/gcerrors"
)

// Metrics counts requests of the object store. A nil *Metrics counts nothing.
type Metrics struct {
	requests *prometheus.CounterVec
	retries  *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	damages  prometheus.Counter
	objects  prometheus.Counter
}

// NewMetrics registers the metrics.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "controlplane_blob_requests_total", Help: "Requests of the object store, by what they do and how they ended.",
		}, []string{"operation", "outcome"}),
		retries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "controlplane_blob_retries_total", Help: "Requests that were made again after one failed.",
		}, []string{"operation"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "controlplane_blob_request_seconds", Help: "How long requests of the object store took.", Buckets: prometheus.ExponentialBuckets(0.001, 4, 8),
		}, []string{"operation"}),
		damages: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "controlplane_blob_damaged_chunks_total", Help: "Chunks that were found altered or gone when they were read.",
		}),
		objects: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "controlplane_blob_collected_objects_total", Help: "Objects that were removed because nothing referred to them.",
		}),
	}
	r.MustRegister(m.requests, m.retries, m.seconds, m.damages, m.objects)
	return m
}

func (m *Metrics) request(what string, err error, took time.Duration) {
	if m == nil {
		return
	}
	outcome := "done"
	switch {
	case gcerrors.Code(err) == gcerrors.NotFound:
		outcome = "not_found"
	case err != nil:
		outcome = "failed"
	}
	m.requests.WithLabelValues(what, outcome).Inc()
	m.seconds.WithLabelValues(what).Observe(took.Seconds())
}

func (m *Metrics) retry(what string) {
	if m != nil {
		m.retries.WithLabelValues(what).Inc()
	}
}

func (m *Metrics) damage() {
	if m != nil {
		m.damages.Inc()
	}
}

func (m *Metrics) collected(n int) {
	if m != nil {
		m.objects.Add(float64(n))
	}
}
