package sqlsession

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Check connects to a data source with a new session and looks at the
// connection, the server and the role. It always returns at least one line.
func (m *Manager) Check(ctx context.Context, name string) []*posternv1.Check {
	m.mu.Lock()
	src := m.sources[name]
	closed := m.closed
	if src != nil && !closed {
		m.wg.Add(1)
	}
	m.mu.Unlock()
	if src == nil {
		return failed("configuration", fmt.Sprintf("no data source %q on this host", name), "declare it in agentd.yaml and reload agentd")
	}
	if closed {
		return failed("reachable", "the agent is going away", "try again")
	}
	defer m.wg.Done()
	return m.check(ctx, src)
}

// CheckUnsaved does the same for a source that is not among ours. It must be
// valid: see ValidateDSN.
func (m *Manager) CheckUnsaved(ctx context.Context, s Source) []*posternv1.Check {
	m.mu.Lock()
	closed := m.closed
	if !closed {
		m.wg.Add(1)
	}
	m.mu.Unlock()
	if closed {
		return failed("reachable", "the agent is going away", "try again")
	}
	defer m.wg.Done()
	return m.check(ctx, newSource(s))
}

func (m *Manager) check(ctx context.Context, src *source) []*posternv1.Check {
	s, err := m.start(ctx, src)
	if err != nil {
		return connectChecks(src.Engine, err)
	}
	defer m.drop(s)
	stop := context.AfterFunc(ctx, func() { _ = s.conn.SetReadDeadline(time.Now().Add(-time.Second)) })
	defer stop()
	var reply frame.CheckedReply
	err = s.send(frame.Check, nil)
	if err == nil {
		var t frame.Type
		if t, err = s.frames.Next(); err == nil && t == frame.Checked {
			err = s.frames.JSON(&reply)
		}
	}
	if err != nil || len(reply.Checks) == 0 {
		return failed("questions", "the SQL session did not answer", "look at agentd's log")
	}
	checks := make([]*posternv1.Check, len(reply.Checks))
	for i, c := range reply.Checks {
		checks[i] = &posternv1.Check{Name: c.Name, Result: c.Result, Message: c.Message, Remedy: c.Remedy}
	}
	return checks
}

func failed(name, message, remedy string) []*posternv1.Check {
	return []*posternv1.Check{{Name: name, Result: "failed", Message: message, Remedy: remedy}}
}

// connectChecks explains why there is no connection.
func connectChecks(engine string, err error) []*posternv1.Check {
	var e *proto.Error
	if !errors.As(err, &e) {
		return failed("session", "the SQL session did not start", "look at agentd's log")
	}
	switch e.Code {
	case proto.CodeSourceCredentials:
		return append([]*posternv1.Check{{Name: "reachable", Result: "ok", Message: engineNames[engine] + " answers"}},
			failed("credentials", e.Error(), "check user in the dsn, the password, and "+rulesOf[engine])...)
	case proto.CodeSourceUnreachable, proto.CodeTimeout, proto.CodeCancelled, proto.CodeOverloaded:
		return failed("reachable", e.Error(), "check host and port in the dsn, the firewall, and that the server runs")
	case proto.CodeSourceConfig:
		return failed("configuration", e.Error(), "mend the data source in agentd.yaml and reload agentd")
	}
	return failed("session", e.Error(), "look at agentd's log")
}

// engineNames and rulesOf are for messages: what answers, and where it says who is let in.
var (
	engineNames = map[string]string{"postgres": "PostgreSQL", "mysql": "MySQL", "sqlite": "SQLite"}
	rulesOf     = map[string]string{"postgres": "the server's pg_hba.conf", "mysql": "the host part of the server's account", "sqlite": "the file's owner and mode"}
)
