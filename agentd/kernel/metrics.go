package kernel

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are the figures of kernels; docs/metrics.md lists them.
type Metrics struct {
	starts   *prometheus.CounterVec
	duration *prometheus.HistogramVec
	shims    prometheus.Counter
	reg      prometheus.Registerer
}

// NewMetrics registers them; nil registers nowhere.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		starts: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "agentd_kernel_starts_total", Help: "Starts of kernels, by outcome."}, []string{"outcome"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "agentd_kernel_start_seconds", Help: "How long starts took until the kernel's processes ran, from the pool (warm) or not (cold).", Buckets: prometheus.ExponentialBuckets(0.001, 4, 9),
		}, []string{"pool"}),
		shims: prometheus.NewCounter(prometheus.CounterOpts{Name: "agentd_kernel_shims_replaced_total", Help: "Shims that ended by themselves and were replaced."}),
		reg:   reg,
	}
	for _, outcome := range []string{"done", "failed"} {
		m.starts.WithLabelValues(outcome)
	}
	if reg != nil {
		reg.MustRegister(m.starts, m.duration, m.shims)
	}
	return m
}

func (m *Metrics) started(outcome string, warm bool, took time.Duration) {
	m.starts.WithLabelValues(outcome).Inc()
	if outcome != "done" {
		return
	}
	pool := "cold"
	if warm {
		pool = "warm"
	}
	m.duration.WithLabelValues(pool).Observe(took.Seconds())
}

// Register adds the gauges of a manager's kernels.
func (m *Metrics) Register(k *Manager) {
	if m.reg == nil {
		return
	}
	m.reg.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "agentd_kernels", Help: "Kernels of this host, dead and suspended ones included, those that wait in the pool not."}, func() float64 {
			k.mu.Lock()
			defer k.mu.Unlock()
			return float64(len(k.kernels))
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "agentd_kernels_waiting", Help: "Kernels in the pool that are ready to be taken."}, func() float64 { return float64(k.Waiting()) }),
	)
}
