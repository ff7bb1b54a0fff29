// Package kernel starts, finds and stops Jupyter kernels on agents for whoever may
// ask: it remembers which agent has which kernel, sends each request down that agent's
// tunnel, opens kernels' channels, and leaves an audit entry for all that touches
// data. The API and Jupyter's protocol come through here.
//
// A kernel belongs to the token that started it. Its owner alone attaches and
// restarts; operators of the organization see, interrupt and stop it, too. The host
// decides by its own policy in any case.
//
// A kernel is NOT_FOUND only when its agent said so, or was revoked; while the agent is
// away it is AGENT_OFFLINE. The row of a kernel is written before its agent is asked to
// start it, so that none can run unknown; it goes with the kernel.
//
// The package keeps no state of its own and starts no goroutine that outlives a
// call. A Service may be used by several goroutines.
package kernel
