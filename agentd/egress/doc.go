// Package egress makes agentd's requests by HTTP in processes of their own: to Vault and to buckets. An
// egress process, a child of agentd without rights or files, does what touches the network: name
// resolution, the proxy, TCP, TLS with its certificates, HTTP. There is one for each destination, so that what takes
// over one of them by an answer has what passes there, and nothing of another's.
//
// agentd has a Client, an http.RoundTripper, which speaks plain HTTP/1.1 with its process over
// socket pairs; the process forwards to the one scheme and host that it was told at its start, and to no other.
// What comes back has been read and written anew there: agentd takes a status, a bounded header and a body from it.
// What is said between the two:
//
//	agentd to the process, on descriptor 3 (SOCK_STREAM):
//	  u32 length (at most maxConfig), config as JSON      once, at first
//	  'c' with a descriptor: one end of a new connection, on which agentd is the client
//	  end of file: end
//
// A request that fails on the network is answered with failureHeader, which is never taken from a server. Credentials are in
// requests' headers and in the proxy's URL, and so on these sockets, never in arguments or an environment.
//
// A process starts with the first request, and again when it is gone; it ends with Client.Close, after idleTime without
// a request, or with agentd, whatever happens to that. Linux only. Package uplink does the same for the tunnel, which has a TLS of its own inside.
package egress
