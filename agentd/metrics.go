package main

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/postern-dev/postern/agentd/attach/mountd"
	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/proto"
)

// registerMetrics adds the daemon's own figures; docs/metrics.md lists all.
func (d *Daemon) registerMetrics() {
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f)
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "agentd_build_info", Help: "1, with the version of agentd and of the protocol.",
		ConstLabels: prometheus.Labels{"version": proto.Software(), "protocol": fmt.Sprintf("%d.%d", proto.ProtocolMajor, proto.ProtocolMinor)},
	})
	build.Set(1)
	log := d.log
	d.registry.MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), build,
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "agentd_audit_entries_total", Help: "Entries that this process appended to the audit log."}, func() float64 {
			n, _ := log.Stats()
			return float64(n)
		}),
		gauge("agentd_audit_bytes", "Size of the audit log.", func() float64 { _, n := log.Stats(); return float64(n) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "agentd_audit_retired_entries_total", Help: "Entries that this process dropped for their age, or for the size of the log."}, func() float64 {
			n, _ := log.Retired()
			return float64(n)
		}),
		gauge("agentd_audit_first_entry", "Number of the oldest entry that is kept.", func() float64 { _, first := log.Retired(); return float64(first) }),
		gauge("agentd_certificate_expiry_timestamp_seconds", "When the identity's certificate expires.", func() float64 {
			_, expires := d.identity.Validity()
			return float64(expires.Unix())
		}),
		gauge("agentd_attachments_workspaces", "Workspaces and buckets that are open on this host.", func() float64 {
			one := func(mountd.MountedStatus) float64 { return 1 }
			return d.attach.sum(false, one) + d.attach.sum(true, one)
		}),
		gauge("agentd_attachments_unsent_changes", "Changes that the control plane has not got, of all workspaces.", func() float64 {
			return d.attach.sum(false, func(w mountd.MountedStatus) float64 { return float64(w.UnsentOps) })
		}),
		gauge("agentd_attachments_unsent_bytes", "Bytes of contents that the control plane has not got, of all workspaces.", func() float64 {
			return d.attach.sum(false, func(w mountd.MountedStatus) float64 { return float64(w.UnsentBytes) })
		}),
		gauge("agentd_attachments_oldest_unsent_timestamp_seconds", "When the oldest change that the control plane, or a bucket, has not got was made; 0: there is none.", func() float64 {
			return d.attach.oldest()
		}),
		gauge("agentd_attachments_cache_bytes", "What contents take on disk, of all workspaces.", func() float64 {
			return d.attach.sum(false, func(w mountd.MountedStatus) float64 { return float64(w.CacheBytes) })
		}),
		gauge("agentd_mountd_up", "1 while the process that serves mounts answers.", func() float64 {
			if d.attach.seen.Load() == nil {
				return 0
			}
			return 1
		}),
		gauge("agentd_sources", "Data sources declared.", func() float64 { return float64(len(d.config.Load().Sources)) }),
	)
	d.registerBucketMetrics()
	d.registerSyslogMetrics()
}

// sum adds something up over the workspaces, or the buckets, that mountd told of last.
func (a *attachments) sum(buckets bool, of func(mountd.MountedStatus) float64) (n float64) {
	if s := a.seen.Load(); s != nil {
		for _, w := range s.Workspaces {
			if w.Bucket == buckets {
				n += of(w)
			}
		}
	}
	return n
}

// oldest is when the oldest unsent change was made, in seconds since 1970; 0: there is none.
func (a *attachments) oldest() (first float64) {
	if s := a.seen.Load(); s != nil {
		for _, w := range s.Workspaces {
			if at := float64(w.Oldest.UnixNano()) / 1e9; !w.Oldest.IsZero() && (first == 0 || at < first) {
				first = at
			}
		}
	}
	return first
}

// registerLinkMetrics adds those of the link.
func (d *Daemon) registerLinkMetrics() {
	k := d.link
	d.registry.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "agentd_link_up", Help: "1 while the tunnel to the control plane is up."}, func() float64 {
			if k.State().Up {
				return 1
			}
			return 0
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "agentd_clock_skew_seconds", Help: "This host's clock minus the control plane's, at the last hello."}, func() float64 {
			return k.State().Skew.Seconds()
		}),
		d.transitions(),
	)
}

// transitions counts the link's changes of state.
func (d *Daemon) transitions() *prometheus.CounterVec {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "agentd_link_transitions_total", Help: "Changes of the link, by the state it came to."}, []string{"state"})
	up, down := v.WithLabelValues("up"), v.WithLabelValues("down")
	d.countUp.Store(&up)
	d.countDown.Store(&down)
	return v
}

func (d *Daemon) countTransition(up bool) {
	at := &d.countDown
	if up {
		at = &d.countUp
	}
	if c := at.Load(); c != nil {
		(*c).Inc()
	}
}

// listenMetrics serves the metrics on this host too, where asked for.
func (d *Daemon) listenMetrics(c *config.Config) error {
	if c.Metrics.Network == "" {
		return nil
	}
	if c.Metrics.Network == "unix" {
		// One agentd holds the state directory's lock: what is there is stale.
		if st, err := os.Stat(c.Metrics.Address); err == nil && st.Mode()&os.ModeSocket != 0 {
			if err := os.Remove(c.Metrics.Address); err != nil {
				return fmt.Errorf("metrics.listen: %w", err)
			}
		}
	}
	l, err := net.Listen(c.Metrics.Network, c.Metrics.Address)
	if err != nil {
		return fmt.Errorf("metrics.listen: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(d.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	d.metrics = &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(d.logger.Handler(), slog.LevelDebug),
	}
	server := d.metrics
	d.serving.Go(func() {
		server.Serve(l) //nolint:errcheck // it ends with Close
	})
	d.logger.Info("metrics served on this host", "address", l.Addr().String())
	return nil
}
