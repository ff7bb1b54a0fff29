package main

import (
	"github.com/postern-dev/postern/agentd/audit"
	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// agree notes up to which entry of this host's log the control plane has said that it knows it, and that the
// two fit; none while they don't.
func (d *Daemon) agree(known *posternv1.AuditHead, warning string) {
	head, err := auditchain.HeadFromProto(known)
	if err != nil || warning != "" {
		head = auditchain.Head{}
	}
	d.agreed.Store(head.Sequence)
}

// setRetention puts what the configuration says of the log into force.
func (d *Daemon) setRetention(c *config.Config) {
	d.log.SetRetention(audit.Retention{Age: c.Audit.Retention, Bytes: c.Audit.MaxSize})
}

// retirable is the last entry that may be dropped: the control plane knows of it, and has the statements of
// kernels up to it, and the syslog server has it. 0: none, such as before the first hello.
func (d *Daemon) retirable() uint64 {
	through := min(d.agreed.Load(), d.reports.Told())
	if d.forward != nil {
		through = min(through, d.forward.through.Load())
	}
	return through
}
