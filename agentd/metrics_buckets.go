package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/postern-dev/postern/agentd/attach/mountd"
)

// registerBucketMetrics adds what mountd says of buckets.
func (d *Daemon) registerBucketMetrics() {
	gauge := func(name, help string, of func(mountd.MountedStatus) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			return d.attach.sum(true, of)
		})
	}
	d.registry.MustRegister(
		gauge("agentd_buckets", "Buckets that are open on this host.", func(mountd.MountedStatus) float64 { return 1 }),
		gauge("agentd_bucket_unsent_files", "Files that buckets have not got, or not as they are here.", func(w mountd.MountedStatus) float64 { return float64(w.UnsentOps) }),
		gauge("agentd_bucket_unsent_bytes", "Bytes of these files.", func(w mountd.MountedStatus) float64 { return float64(w.UnsentBytes) }),
		gauge("agentd_bucket_hidden_keys", "Keys that cannot be files, as often as mounts that live met them.", func(w mountd.MountedStatus) float64 { return float64(w.Hidden) }),
		gauge("agentd_bucket_cache_bytes", "What objects take on disk.", func(w mountd.MountedStatus) float64 { return float64(w.CacheBytes) }),
	)
}
