package sqlsession

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/child"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/filebroker"
)

// aside is what a process gets beside its socket: the way to the parser of statements
// or, for a database that is a file, to who opens it. The caller closes it once the
// process has it.
func (m *Manager) aside(src *source) (*os.File, error) {
	m.mu.Lock()
	source := src.Source
	m.mu.Unlock()
	if source.Engine != "sqlite" {
		return m.introducer()
	}
	path, err := child.ParseSQLiteDSN(source.DSN)
	if err != nil {
		return os.Open(os.DevNull) // refused when it connects
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	// It ends when the process does, and with it the other end.
	m.wg.Add(1)
	go func() {
		defer m.wg.Done()
		filebroker.Server{Path: path, ReadWrite: source.ReadWrite}.Serve(pair[0])
	}()
	return os.NewFile(uintptr(pair[1]), "files"), nil
}
