// Package remote is the way from a replica to the control plane: Remote is what a replica
// calls, Client does it through agentd's unix socket, and simulatedremote is a control
// plane in memory for tests. Calls are made once; what outlives a short loss of the link is a replica's request.
//
// The process that serves mounts has no identity of its own; agentd lends it the tunnel.
// Only packages below agentd/attach, and agentd's own wiring, import it.
package remote
