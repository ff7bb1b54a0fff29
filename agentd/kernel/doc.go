// Package kernel runs Jupyter kernels on the host: Manager starts, finds, adopts and
// stops them. Each kernel has a directory, a sandbox for its processes and a shim, a
// process that stands beside it and outlives agentd; see the packages in internal.
//
// Life cycle: New, Set, Open; Close leaves all kernels running. A Manager looks after the
// shims: one that dies is started again and adopts its kernel. It decides nothing: what
// the host's policy allows is asked before (package policy).
//
// Memory is the last word of each shim; directories are the truth: DIR/UUID with
// spec.json (what to run, whose it is; no id: it waits in the pool) and the mark
// "stopping". Only agentd's main package imports it.
package kernel
