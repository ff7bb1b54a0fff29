// Package cgroup holds kernels and SQL sessions to limits by control groups (cgroups(7)).
//
// Each has a group of its own in every hierarchy that holds a controller for one of its
// limits, and kernels in the unified one too, if it is there: CGROUP/postern-kernels/ID and CGROUP/postern-sql/ID, or,
// where systemd has delegated a group for that in the slice of all workloads, below it (docs/privileges.md).
// Controllers may be in version 1 hierarchies, in version 2, or in some of each. What a
// host lacks is said by Groups.Lacks, and nothing else changes.
//
// Linux only; any package of agentd may import it. Groups may be used by one goroutine at a time.
package cgroup
