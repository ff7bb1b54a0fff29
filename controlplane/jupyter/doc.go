// Package jupyter serves Jupyter's clients: JupyterLab, notebook and nbclient by their
// gateway settings, VS Code, and whatever else speaks the REST and WebSocket protocol
// of a Jupyter server. Below /jupyter/AGENT/ an agent looks like a server that has
// kernels, kernelspecs and sessions and no files.
//
// A caller is known by its API token: "Authorization: Bearer T" or "token T", ?token=T,
// or in the path, /jupyter/AGENT/t/T/api/..., for clients that send a token with their
// requests and none with their WebSocket. There are no cookies, so nothing can be done in
// a caller's name from another site; a WebSocket with the Origin of another site is refused
// all the same.
//
// While an agent is away the answer is 503 with Retry-After, which clients repeat; 404
// means that a kernel is gone.
//
// # Channels
//
// A client's WebSocket is kept while the agent is away: what the client sends waits here
// (up to 256 messages or 16 MiB, then it is not read from), what the kernel prints
// waits in its journal on the host, and both go on when the agent is back. On both
// ways nothing is lost and nothing comes twice:
//
//	client ──message──▶ pending ──send──▶ host; taken ends pending; on a new stream the rest is sent again
//	client ◀──message── written ◀─delivery─ host; what a new stream brings once more is dropped by its number
//
// A client that loses its WebSocket and comes back with the same session_id gets what it
// has not received: a WebSocket ping follows the messages, and when the pong is here the
// client has read what was before it; that is what the host is told to be confirmed. A client
// that breaks off between a message and its pong, a round trip or 64 messages at most, may get
// those again.
//
// A message of a client that makes a kernel run code has its audit entry before it
// is sent on.
//
// Memory of a connection: one message from the client and one for it, each at most
// 64 MiB, and what is pending. Each has four goroutines, which end with it.
package jupyter
