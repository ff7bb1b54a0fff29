package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/proto/auditchain"
	"github.com/postern-dev/postern/proto/syslog"
)

// SyslogOptions say where the organizations' audit logs are forwarded to; an empty To is nowhere.
type SyslogOptions struct {
	To       string
	Facility string
	// Files are for tls:// alone.
	Files      syslog.Files
	MaxMessage int // in bytes; 0: what rsyslog takes
}

// validate reports the first mistake.
func (o SyslogOptions) validate() error {
	if o.To == "" {
		if o != (SyslogOptions{MaxMessage: o.MaxMessage, Facility: o.Facility}) {
			return errors.New("--audit-syslog-ca, --audit-syslog-cert and --audit-syslog-key mean nothing without --audit-syslog")
		}
		return nil
	}
	target, err := syslog.ParseTarget(o.To)
	if err != nil {
		return fmt.Errorf("--audit-syslog: %w", err)
	}
	if _, err := syslog.Facility(o.Facility); err != nil {
		return fmt.Errorf("--audit-syslog-facility: %w", err)
	}
	switch {
	case (o.Files.Cert == "") != (o.Files.Key == ""):
		return errors.New("--audit-syslog-cert and --audit-syslog-key belong together")
	case o.Files != (syslog.Files{}) && target.Network != "tls":
		return errors.New("--audit-syslog-ca, --audit-syslog-cert and --audit-syslog-key need --audit-syslog tls://HOST:PORT")
	case o.MaxMessage != 0 && (o.MaxMessage < syslog.LeastMessage || o.MaxMessage > syslog.MostMessage):
		return fmt.Errorf("--audit-syslog-max-message is not between %d and %d", syslog.LeastMessage, syslog.MostMessage)
	}
	return nil
}

var _ syslog.Chain = organizationChain{}

// organizationChain is an organization's chain with how far it was forwarded, both in the store.
type organizationChain struct {
	store        *store.Store
	to           string
	organization string
}

// After implements syslog.Chain.
func (c organizationChain) After(ctx context.Context, after uint64, limit int) ([][]byte, error) {
	lines, _, err := c.store.AuditAfter(ctx, c.organization, after, limit)
	return lines, err
}

// Position implements syslog.Chain.
func (c organizationChain) Position(ctx context.Context) (auditchain.Head, error) {
	return c.store.AuditForwarded(ctx, c.to, c.organization)
}

// Keep implements syslog.Chain.
func (c organizationChain) Keep(ctx context.Context, h auditchain.Head) error {
	return c.store.SetAuditForwarded(ctx, c.to, c.organization, h)
}

// newForwarder makes what forwards the chains, if the options say where; nil if not.
func (s *Server) newForwarder(registry prometheus.Registerer) (*syslog.Forwarder, error) {
	o := s.options.AuditSyslog
	if o.To == "" {
		return nil, nil
	}
	target, err := syslog.ParseTarget(o.To)
	if err != nil {
		return nil, fmt.Errorf("--audit-syslog: %w", err)
	}
	facility, err := syslog.Facility(o.Facility)
	if err != nil {
		return nil, fmt.Errorf("--audit-syslog-facility: %w", err)
	}
	name, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("--audit-syslog: %w", err)
	}
	f := syslog.New(syslog.Config{
		Logger: s.log, Target: target, TLS: o.Files.Config, Facility: facility, MaxMessage: o.MaxMessage,
		Hostname: name, App: "postern-controlplane", PID: os.Getpid(),
		Chains: func(ctx context.Context) (map[string]syslog.Chain, error) {
			waiting, err := s.store.AuditWaiting(ctx, target.String())
			chains := map[string]syslog.Chain{}
			for _, organization := range waiting {
				chains[organization] = organizationChain{s.store, target.String(), organization}
			}
			return chains, err
		},
		Leads: s.forwards,
	})
	registry.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "controlplane_audit_syslog_up", Help: "1 while this control plane forwards audit logs to the syslog server."}, func() float64 {
			if f.Stats().Connected {
				return 1
			}
			return 0
		}),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "controlplane_audit_syslog_messages_total", Help: "Messages sent to the syslog server, those that were sent again included."}, func() float64 {
			return float64(f.Stats().Sent)
		}),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "controlplane_audit_syslog_failures_total", Help: "Connections to the syslog server that failed or broke."}, func() float64 {
			return float64(f.Stats().Failures)
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "controlplane_audit_syslog_oldest_waiting_timestamp_seconds", Help: "When the oldest audit entry that the syslog server has not got was written; 0: there is none, or another control plane forwards."}, func() float64 {
			if t := f.Stats().Oldest; !t.IsZero() {
				return float64(t.UnixMilli()) / 1000
			}
			return 0
		}),
	)
	return f, nil
}

// forwards reports whether this control plane is the one that forwards: the first by name of those that live. For a
// moment two may be, and then entries come twice.
func (s *Server) forwards() bool {
	if s.replicas == nil {
		return true
	}
	return !s.draining.Load() && !slices.ContainsFunc(s.replicas.others(), func(other string) bool { return other < s.replica })
}

// forwardAudit forwards until ctx ends, if there is a server.
func (s *Server) forwardAudit(ctx context.Context) {
	if s.forwarder != nil {
		s.forwarder.Run(ctx)
	}
}

// auditNeeded is the last entry of an organization's chain that may be dropped: what the syslog server has.
func (s *Server) auditNeeded(ctx context.Context, organization string) (uint64, error) {
	o := s.options.AuditSyslog
	if o.To == "" {
		return math.MaxUint64, nil
	}
	target, err := syslog.ParseTarget(o.To)
	if err != nil {
		return 0, err
	}
	h, err := s.store.AuditForwarded(ctx, target.String(), organization)
	return h.Sequence, err
}
