// Package registration is how hosts join and how agents keep their identity:
// registration keys, first certificates, renewal with overlap, and the check of
// every request's identity against the store.
//
// A key's secret and its use are judged in this order: known and right secret
// (else KEY_UNKNOWN, for both), organization enabled, key not revoked, not
// expired, uses left, versions, clocks, name and certificate request. Only then is
// one use taken, in the transaction that records the agent; so what is wrong with
// a request never costs a use.
//
// A new certificate is pending until its first handshake, which makes it active
// and retires those before it; so a lost reply costs nothing. A retired
// certificate that is used again has been copied, or its host has: it is refused
// and the audit log says so.
//
// Package pki says who a peer is, package store whether that still holds; both
// are given as interfaces. All methods may be called concurrently.
package registration
