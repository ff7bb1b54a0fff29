package main

import (
	"path/filepath"

	"github.com/postern-dev/postern/agentd/host"
	"github.com/postern-dev/postern/agentd/sqlsession"
)

// holdDir is for what open SQL sessions need to outlive this process. It is gone after
// a reboot, as they are.
func (d *Daemon) holdDir() string { return filepath.Join(d.runtimeDir(), "sql") }

// resumeSessions takes up the SQL sessions that the agentd before left open.
func (d *Daemon) resumeSessions() {
	if n := d.sessions.Resume(func(o sqlsession.Open, lost string) func(string, uint64) {
		return d.host.ResumeSession(host.OpenSession(o), lost)
	}); n > 0 {
		d.logger.Info("sql sessions taken up", "sessions", n)
	}
}
