// Package sqlsplittest has the texts that everything which looks for placeholders is
// tested with: the shell (proto/sqlsplit), SQL sessions (agentd/sqlsession) and
// kernels' module (agentd/kernel). It is for tests.
package sqlsplittest
