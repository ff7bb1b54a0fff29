package sqlsession

import (
	"net"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
)

// SetKillAfter shortens the time that a process has to end a stopped
// statement. It returns the way back.
func SetKillAfter(d time.Duration) func() {
	before := killAfter
	killAfter = d
	return func() { killAfter = before }
}

// SetResetWait changes how long a statement waits for a session to be reset. It returns
// the way back.
func SetResetWait(d time.Duration) func() {
	before := resetWait
	resetWait = d
	return func() { resetWait = before }
}

// NewParserClient connects to a parser as a SQL session's process does.
func NewParserClient(p *Parser) (*pgtree.Client, error) {
	f, err := p.introducer()
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return pgtree.NewClient(conn.(*net.UnixConn)), nil
}

// ParserProcess is the process id of a lane's parser, 0 if there is none.
func (p *Parser) ParserProcess(lane pgtree.Lane) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l := p.lanes[lane]; l.cmd != nil {
		return l.cmd.Process.Pid
	}
	return 0
}

// GroupPrefix begins the names of the control groups of sessions that are held in a directory.
var GroupPrefix = groupPrefix
