// Package peer connects the control planes that share one store. An agent's tunnel ends at
// one of them, its replica; the others reach the agent through that one:
//
//	request ─▶ replica A ──HTTP/2, mutual TLS 1.3──▶ replica B ──tunnel──▶ agent
//
// A stream on the agent's tunnel is forwarded as the bytes it is, so whatever travels on a
// tunnel travels here as well, with the same back-pressure: each forwarded stream is
// one HTTP/2 stream with a window of its own. A lane of a tunnel (a WebSocket that
// the load balancer brought to the wrong replica) is passed on in the same way. Nothing is
// forwarded twice: what comes from a peer is served here or refused.
//
// The paths, all by POST:
//
//	/peer/v1/stream?agent=ID&generation=N&class=C   a stream on an agent's tunnel, both ways
//	/peer/v1/lane                                   the bytes of a lane's HTTP connection, both ways
//	/peer/v1/call/NAME                              a short question; what it is the control plane knows
//
// Errors are those of package proto, as proto.WriteHTTPError writes them.
//
// The package is given TLS in which each end has proved that it belongs to the
// installation (pki.Authority.PeerTLS); it trusts a peer as itself. All methods
// may be called from any goroutine.
package peer
