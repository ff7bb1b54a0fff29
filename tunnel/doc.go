// Package tunnel keeps one authenticated, multiplexed link between an agent
// behind a firewall and a control plane: WebSocket outside, mutual TLS 1.3
// inside, yamux and plain HTTP/1.1 on top. It knows nothing of either side.
//
// Words. A tunnel is made of lanes; a lane is one WebSocket connection. A lane
// carries streams (net.Conn). The class of a stream (Control, Bulk, Solo) picks
// its lane: the control lane exists as long as the tunnel does, bulk and solo
// lanes are dialed on demand. A Control or Bulk lane multiplexes its streams, a
// Solo lane is one stream. The dialer is the side that dials (the agent), the
// acceptor the side that listens (the control plane); both may open streams.
//
// Life cycle. Dial and Server make tunnels; a tunnel lives until Close, until
// its control lane is lost or until it was silent for Config.DeadAfter. The
// contexts given to Dial and Open bound the handshake or the opening, never the
// life of what they return. Losing a bulk or solo lane fails only its streams.
//
// No half-close. Closing a stream ends both of its directions: the peer reads
// what was sent before, then io.EOF, and its writes fail. A stream whose lane
// was lost never ends in io.EOF but in an error, so that a cut is never taken
// for an end. The end of a body must be in its framing, as in HTTP/1.1.
//
// Concurrency. All exported methods may be called from any goroutine.
//
// Bounds. Memory per tunnel is at most MaxStreams times 256 KiB plus
// WindowBudget of received and unread bytes, and two 64 KiB buffers per lane
// that is moving data; an idle lane holds no buffer.
//
// spec.md beside this file describes handshake, lanes and limits so that another
// implementation could be written. Anyone may import this package; it imports
// nothing of ours. tunneltest holds its test kit.
package tunnel
