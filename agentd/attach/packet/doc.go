// Package packet sends messages with descriptors between agentd, mountd and the keeper of
// mounts: one JSON value per packet of a unix socket (SOCK_SEQPACKET), descriptors beside
// it (SCM_RIGHTS), and one answer for each question. Sockets are for root, or for the
// listener's own user, alone. Only packages below agentd/attach, and agentd's wiring,
// import it.
package packet
