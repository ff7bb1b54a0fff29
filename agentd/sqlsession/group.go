package sqlsession

import (
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/cgroup"
	"github.com/postern-dev/postern/agentd/confine"
)

// maxProcesses bounds the threads of a session's process: as its own RLIMIT_NPROC does, which
// what took it over could not raise either.
const maxProcesses = 64

// groupTries is how often a process is started: its new, empty group may be swept away by another
// agentd that starts at this moment.
const groupTries = 3

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
	name := rand.Text()
	if h != nil {
		name = h.name // the agentd that takes it up finds them by that
	}
	for try := 1; ; try++ {
		g := m.group(name)
		err := startBorn(cmd, c, g)
		if err == nil {
			return g, nil
		}
		g.Remove()
		if gone := errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV); !gone || try == groupTries {
			return nil, err
		}
	}
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
