// Package control is the unix socket by which commands on the host ask the
// running agentd: /run/postern-agentd/agentd.sock, mode 0600 in a directory 0700.
// It speaks HTTP: GET /status, GET /check?source=NAME, POST /candidate. Only agentd's own user and
// root get an answer. It changes nothing. Server and client live here together,
// with the words they use. Everything may be used from several goroutines.
package control
