// Package frame is the protocol between agentd and a SQL session's process,
// over one unix socket pair.
//
// A frame is one byte of type, four bytes of length (big endian) and a payload
// whose size each type bounds. The payloads are JSON but for Data (bytes of an
// Arrow IPC stream), Progress (a number) and Cancel (one byte, the [Reason]).
//
//	agentd              process
//	Connect   ------>
//	          <------   Connected | Failed
//	Run       ------>
//	Cancel    ------>   (any number, before Done)
//	          <------   Begun, Data, Progress ... Done | Failed (it was not run)
//	          <------   Idle (the database session is reset)
//	Check     ------>
//	          <------   Checked, Idle
//
// A process that loses the socket cancels its statement in the database and
// ends. Everything here is plain data; a Reader and its source belong to one
// goroutine.
package frame
