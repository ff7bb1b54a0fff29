package sqlsession

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"strings"

	"github.com/postern-dev/postern/agentd/cgroup"
	"github.com/postern-dev/postern/agentd/confine"
)

// maxProcesses bounds the threads of a session's process: as its own RLIMIT_NPROC does, which
// what took it over could not raise either.
const maxProcesses = 64

// groupPrefix begins the names of the groups of the agentd whose sessions are held in a directory, so that it
// finds what its previous lives left and touches nothing of another agentd's.
func groupPrefix(hold string) string {
	sum := sha256.Sum256([]byte(hold))
	return hex.EncodeToString(sum[:6]) + "-"
}

// groupOf is the name of a process's groups: the agentd that takes a held one up finds them by it.
func (m *Manager) groupOf(h *held) string {
	if h == nil {
		return groupPrefix(m.config.Hold) + rand.Text()
	}
	return groupPrefix(m.config.Hold) + h.name
}

// groupLimits are those of a session's group.
func (m *Manager) groupLimits() cgroup.Limits {
	return cgroup.Limits{Memory: m.config.Memory, PIDs: maxProcesses}
}

// group makes the control groups of a new process. What can't be made is logged once: then
// sessions run without.
func (m *Manager) group(name string) *cgroup.Groups {
	if !m.root {
		return nil
	}
	g, err := cgroup.Make(cgroup.SQL, name, m.groupLimits(), false)
	m.lacking.Do(func() {
		if lacks := g.Lacks(); err != nil || len(lacks) > 0 {
			m.log.Warn("sql sessions are not held to all their limits", "missing", strings.Join(lacks, "; "), "err", err)
		}
	})
	return g
}

// Limits tries whether this host can hold SQL sessions to their limits: by what, and which not, a line
// each. An error is a host that can't be read. It is for root.
func Limits() (where, lacks []string, err error) {
	g, err := cgroup.Make(cgroup.SQL, "doctor-"+rand.Text(), cgroup.Limits{Memory: DefaultMemory, PIDs: maxProcesses}, false)
	if err != nil {
		return nil, nil, err
	}
	defer cgroup.Tidy(cgroup.SQL)
	defer g.Remove()
	return g.Where(), g.Lacks(), nil
}

// startIn starts the process of a session in control groups of its own.
func (m *Manager) startIn(cmd *exec.Cmd, c confine.Confinement, h *held) (*cgroup.Groups, error) {
	g := m.group(m.groupOf(h))
	if err := startBorn(cmd, c, g); err != nil {
		g.Remove()
		return nil, err
	}
	return g, nil
}

// startBorn starts a process that is born in its groups.
func startBorn(cmd *exec.Cmd, c confine.Confinement, g *cgroup.Groups) error {
	tasks, unified := g.Birth()
	c.Tasks = tasks
	if unified != "" {
		dir, err := os.Open(unified)
		if err != nil {
			return err
		}
		defer dir.Close() //nolint:errcheck // it is only named
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	return confine.Start(cmd, c)
}

// ended notes, when the process is gone, whether it was killed for its memory.
func (s *session) ended() { s.overMemory = s.groups.OOMKills() > 0 }
