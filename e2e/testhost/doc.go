// Package testhost boots disposable Debian hosts with a real systemd as their
// first process, for tests of the packages and units: systemd-nspawn, without
// a systemd on this machine.
//
// A [Host] is made with [Boot] and taken away with [Host.Destroy], which leaves
// no process, mount, namespace or cgroup behind. Its root file system is
// unpacked from a tar that mmdebstrap makes once per suite and list of packages,
// and that is kept in [CacheDir]. Unpacked and not an overlay: agentd's kernels
// have overlays of their own, and one on another the kernel refuses.
//
// The host has a network namespace of its own with nothing but loopback in it,
// and a pure cgroup v2, with those controllers that this machine does not hold
// in version 1. It needs root, and Debian's mmdebstrap, systemd-container and an
// apt source. Commands inside run outside of the host's cgroups: what is to be
// in a unit is started with systemd-run or systemctl.
//
// A Host is for one goroutine, but Run and what builds on it may be called from
// several.
package testhost
