// Package confine takes from a process of agentd what it has no use for: its user,
// capabilities, files, ports, system calls, debuggers and descriptors. A part of that
// is done by agentd before the process starts (Start, CloseOnExec), since it cannot be
// given back, and a part by the process itself, first thing (Harden, ForbidAll,
// ForbidAllButDialing). SQL sessions, the parser of statements and the uplink are such
// processes. Linux only; any package of agentd may import it.
package confine
