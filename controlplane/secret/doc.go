// Package secret keeps secrets for kernels and gives them to the hosts that run them.
//
//	secret   a name (a variable's in the kernel's environment) and a value, sealed
//	scope    whose it is: a token's own, a workspace's, the organization's
//	grant    who has it: one kernel, or all kernels of a token; kernels that mount a
//	         workspace have its secrets without one
//	put      one request to a host, with all secrets that a kernel is to have
//
// Values are sealed with a key of the organization's, derived from DATA/master.key, and
// bound to organization, scope, owner and name: a row that was moved does not open. A
// value leaves this package in one way alone: to the agent that runs the kernel, whose own
// policy has the last word. A host may also read secrets itself; of those only names are
// known here.
//
// Each set, removal and grant gives the kernels that run the new state at once; what does
// not reach a host, because it is away, is given to it when it comes back (AgentUp). Every
// act is an audit entry, with names and never with values.
//
// A Service may be used by several goroutines; Close waits for those that it started. It
// imports nothing of the control plane's other packages.
package secret
