// Package atomicfile replaces files whole: a reader sees the old content or the
// new, whatever moment the power fails. Every step has a name, so that a test
// can make any one of them fail. It imports nothing of ours; agentd's packages
// that keep state may import it. An FS may be used from several goroutines, but
// not for the same path at once.
package atomicfile
