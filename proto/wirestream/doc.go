// Package wirestream carries a session of PostgreSQL's own protocol between the
// control plane, where clients connect, and the host, where the database is.
//
//	control plane                              host
//	POST /postern/v1/wire, Upgrade  ──────▶    policy, audit, database session
//	                                ◀──────    101 (or a status and an ErrorDetail)
//	                                ◀──────    'o' WireOpened
//	'd' the client's messages       ──────▶
//	                                ◀──────    'd' messages for the client, 'e' WireEvent, ...
//	                                ◀──────    'z' WireEnd
//
// The control plane has answered for startup, TLS and authentication; after
// WireOpened it sends the client AuthenticationOk, the ParameterStatus messages that
// WireOpened names, a BackendKeyData of its own and ReadyForQuery (idle). From then
// on 'd' frames hold what PostgreSQL's protocol has on the wire after startup, in
// pieces that keep to no message's edges. A frame is
//
//	type    1 byte
//	length  4 bytes, big-endian, of the payload alone
//	payload at most 256 KiB of data; 128 KiB of a message
//
// A CancelRequest is not in the stream, where it would wait behind data that
// nobody takes: it is HostService.CancelQuery with the session's id. There is no
// half-close: either side ends the session by closing the stream; the host sends
// 'z' first, if it can. The client's Terminate is data like the rest, and 'z'
// answers it. A stream that ends without 'z' means that the host was lost.
//
// Nobody waits for more data to fill a frame. The stream's own back-pressure is
// the only flow control. A Reader or a Writer holds one frame at most; a Reader
// belongs to one goroutine, a Writer may be used by several. Anyone may import this
// package.
package wirestream
