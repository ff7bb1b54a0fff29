// Package sandbox runs one Jupyter kernel on the host where it can do no harm:
// as a user of its own without capabilities, in its own PID, mount, network, IPC
// and UTS namespaces, with a root directory that holds nothing but the system's
// programs, behind a seccomp filter, in a cgroup with limits, and behind a fence
// that decides where it may connect to.
//
// Words. The starter is the process that calls Start (the kernel's shim). Init
// is the first process in the kernel's PID namespace; it reaps and does nothing
// else (initelf.go). The main process is its first child: the kernel itself.
//
//	starter ── agentd kernel-init (sets everything up, then becomes) init ── main process ── ...
//
// Everything in the tree is as CRIU wants it: no descriptor and no mount from
// outside but those that CRIUSpec names, so that a kernel can be dumped and
// restored. What a restore needs on the host is made by Prepare, and what came
// of it is taken over by Adopt; a shim that was started anew adopts as well.
//
// Life cycle: Start, Prepare+Adopt or Adopt give a Sandbox; Kill ends the kernel
// with everything in it; Close lets go of it without ending it. Cleanup removes
// what a sandbox leaves on the host, whatever died in between. A Sandbox may be
// used by several goroutines.
//
// Only package kernel and its parts import it.
package sandbox
