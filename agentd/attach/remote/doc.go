// Package remote is the way from a replica to the control plane: Remote is what a replica
// calls, Client does it through agentd's unix socket, Patient lets reads outlive a short loss of the link, and
// simulatedremote is a control plane in memory for tests.
//
// The process that serves mounts has no identity of its own; agentd lends it the tunnel.
// Only packages below agentd/attach, and agentd's own wiring, import it.
package remote
