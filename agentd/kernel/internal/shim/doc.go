// Package shim is the process that stands beside each kernel, `agentd kernel-shim`:
// it starts the kernel in its sandbox, owns the ZeroMQ side, journals what the kernel
// says, and serves agentd on a unix socket. It is started by agentd and outlives it;
// when it dies itself the kernel goes on, and the next shim adopts kernel and journal.
//
//	agentd ⇄ DIR/shim.sock ⇄ shim ⇄ DIR/run/k-1..5 (ZeroMQ) ⇄ kernel in its sandbox
//
// Words. A client is who attached to the kernel's channels under a name (the Jupyter
// session); it has one stream at most. A request is a client's message on shell or
// control that awaits a reply. A generation is one life of the kernel's processes, an
// epoch one set of connections to them.
//
// The way out: each message of the kernel goes to the journal, at the kernel's pace,
// and from the journal to each client, at the client's. Nobody holds up the kernel, and
// no memory grows with output. The way in: messages wait in a bounded queue for each
// channel until the kernel is ready for them; a client whose message finds no room
// waits. State and control (interrupt, restart, quiesce) go by HTTP requests of their
// own and wait for neither.
//
// Quiesce closes all five sockets for a checkpoint; Resume and TakeOver open them
// again. What was sent and not answered is known: when an answer was lost because
// nobody was connected, a reply is made from what the kernel said on iopub, so no client
// waits for ever (see sweep).
//
// DIR belongs to root alone (0700): spec.json (agentd writes it, see Spec), shim.json
// (State, ours), shim.lock, shim.sock (0600), shim.log, journal/, run/ (the kernel can
// write it: nothing there is trusted), private/, log, sandbox.json and root/ (package
// sandbox).
//
// Only package kernel and its parts import it.
package shim
