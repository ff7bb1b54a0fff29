package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/postern-dev/postern/agentd/atomicfile"
	"github.com/postern-dev/postern/agentd/audit"
	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/proto/auditchain"
	"github.com/postern-dev/postern/proto/syslog"
)

// syslogFile keeps, in the state directory, up to where the syslog server has the audit log.
const syslogFile = "audit-syslog.json"

// syslogPosition is what it holds. Another server gets the log from its beginning.
type syslogPosition struct {
	To       string `json:"to"`
	Sequence uint64 `json:"sequence"`
	Hash     []byte `json:"hash"`
}

// forward forwards the host's audit log to a syslog server.
type forward struct {
	*syslog.Forwarder
	chain *hostChain
	// through is the last entry that the server has, as far as this process knows.
	through *atomic.Uint64
}

var _ syslog.Chain = (*hostChain)(nil)

// hostChain is the host's log with its position, which is on disk.
type hostChain struct {
	log     *audit.Log
	path    string
	to      string
	through atomic.Uint64
}

// newForward makes what forwards the log, if the configuration says where; nil if not.
func (d *Daemon) newForward(c *config.Config) *forward {
	s := c.Audit.Syslog
	if s.Target == (syslog.Target{}) {
		return nil
	}
	name, err := os.Hostname()
	if err != nil {
		d.logger.Warn("syslog messages will not name this host", "err", err)
	}
	chain := &hostChain{log: d.log, path: filepath.Join(d.state, syslogFile), to: s.Target.String()}
	return &forward{
		chain: chain, through: &chain.through,
		Forwarder: syslog.New(syslog.Config{
			Logger: d.logger, Target: s.Target, TLS: s.Files.Config, Facility: s.Facility, MaxMessage: s.MaxMessage,
			Hostname: name, App: "postern-agentd", PID: os.Getpid(),
			Chains: func(context.Context) (map[string]syslog.Chain, error) { return map[string]syslog.Chain{"": chain}, nil },
		}),
	}
}

// run forwards until ctx ends; without a server it does nothing.
func (f *forward) run(ctx context.Context) {
	if f != nil {
		f.Run(ctx)
	}
}

// After implements syslog.Chain.
func (h *hostChain) After(_ context.Context, after uint64, limit int) ([][]byte, error) {
	if h.log.Head().Sequence <= after {
		return nil, nil
	}
	return h.log.Read(after+1, limit)
}

// Position implements syslog.Chain.
func (h *hostChain) Position(context.Context) (auditchain.Head, error) {
	raw, err := os.ReadFile(h.path)
	if errors.Is(err, fs.ErrNotExist) {
		return auditchain.Head{}, nil
	} else if err != nil {
		return auditchain.Head{}, err
	}
	var p syslogPosition
	if err := json.Unmarshal(raw, &p); err != nil {
		return auditchain.Head{}, fmt.Errorf("%s is damaged (%w): remove it to forward the log from its beginning", h.path, err)
	}
	head := auditchain.Head{Sequence: p.Sequence}
	if p.To != h.to || copy(head.Hash[:], p.Hash) != len(head.Hash) {
		return auditchain.Head{}, nil
	}
	h.through.Store(head.Sequence)
	return head, nil
}

// Keep implements syslog.Chain.
func (h *hostChain) Keep(_ context.Context, head auditchain.Head) error {
	raw, err := json.Marshal(syslogPosition{h.to, head.Sequence, head.Hash[:]})
	if err != nil {
		return err
	}
	if err := (atomicfile.FS{}).Write(h.path, raw, 0o600); err != nil {
		return err
	}
	h.through.Store(head.Sequence)
	return nil
}

// registerSyslogMetrics adds the figures of forwarding, where there is a server.
func (d *Daemon) registerSyslogMetrics() {
	if d.forward == nil {
		return
	}
	f := d.forward
	d.registry.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "agentd_audit_syslog_up", Help: "1 while the syslog server takes the audit log."}, func() float64 {
			if f.Stats().Connected {
				return 1
			}
			return 0
		}),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "agentd_audit_syslog_messages_total", Help: "Messages sent to the syslog server, those that were sent again included."}, func() float64 {
			return float64(f.Stats().Sent)
		}),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "agentd_audit_syslog_failures_total", Help: "Connections to the syslog server that failed or broke."}, func() float64 {
			return float64(f.Stats().Failures)
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "agentd_audit_syslog_waiting_entries", Help: "Audit entries that the syslog server has not got."}, func() float64 {
			head, through := d.log.Head().Sequence, f.through.Load()
			return float64(head - min(head, through))
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "agentd_audit_syslog_oldest_waiting_timestamp_seconds", Help: "When the oldest entry that the syslog server has not got was written; 0: there is none."}, func() float64 {
			if t := f.Stats().Oldest; !t.IsZero() {
				return float64(t.UnixMilli()) / 1000
			}
			return 0
		}),
	)
}
