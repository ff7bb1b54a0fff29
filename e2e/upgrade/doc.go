// Package upgrade holds the control plane, the agent and the command of this version
// against those of the version before, whose commit is in packaging/previous: each with
// each, and an upgrade in place. Its tests have the build tag upgrade and are run by
// `make upgrade-test`, which builds the version before from the repository's history; so
// they need one that has it.
package upgrade
