// Package uplink makes the tunnel's connections in a process of their own. The
// uplink, a child of agentd without rights, files or secrets of the host, does what
// touches the network before anything is verified: name resolution, the proxy, TCP,
// the outer TLS, the HTTP upgrade and WebSocket. It hands agentd a stream of bytes for
// each lane, in which agentd speaks the inner mutual TLS with the control plane: an
// uplink that was taken over can cut and delay what passes, as the network can, and
// neither read it, nor forge it, nor ask for anything.
//
// There is one uplink for each tunnel (Starter.Carrier), which ends with it, or with
// agentd, whatever happens to that. What is said between the two:
//
//	agentd to uplink, on descriptor 3 (SOCK_STREAM):
//	  u32 length (at most maxConfig), config as JSON      once, at first
//	  'c' with a descriptor: one end of a new connection                for each lane
//	  end of file: send what is on the way, then end
//
// The rest is said on those connections, see tunnel.CarrierServer. The proxy's
// credentials, the only secret that an uplink has, come this way and no other.
package uplink
