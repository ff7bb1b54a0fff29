// Package localsql is how a kernel asks for SQL on its own host: the server's side
// of what the Python module postern speaks on a unix socket.
//
//	kernel                      agentd
//	'q' Request (JSON)  ─────▶  policy, audit, SQL session
//	                    ◀─────  'd' pieces of an Arrow IPC stream ...
//	                    ◀─────  'e' Outcome (JSON), and the end
//
// A request runs a statement, or asks which data sources there are, or which
// placeholders a statement has: what is a quote or a comment differs between engines,
// so the module leaves finding them to the host and sends the values of these names.
//
// A frame is a type (1 byte), a length (4 bytes, big-endian) and a payload: 8 MiB of a
// request, 256 KiB of data, 1 MiB of an outcome at most. One connection carries one
// request; closing it cancels the statement. Nothing on the connection says who asks:
// whoever passes it on must know whose it is. The socket's own back-pressure is the
// only flow control; a connection holds one frame of data.
package localsql
