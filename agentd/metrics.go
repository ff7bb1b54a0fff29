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
		gauge("agentd_certificate_expiry_timestamp_seconds", "When the identity's certificate expires.", func() float64 {
			_, expires := d.identity.Validity()
			return float64(expires.Unix())
		}),
		gauge("agentd_sources", "Data sources declared.", func() float64 { return float64(len(d.config.Load().Sources)) }),
	)
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
