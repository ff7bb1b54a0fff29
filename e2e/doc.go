// Package e2e holds the tests that start the real binaries: agentd, controlplane
// and postern, built once per run, with a real PostgreSQL, a real nginx, a real
// HTTP proxy and a real firewall where the test is about those. Its directories
// hold what these tests, the demo and the benchmarks are made of.
package e2e
