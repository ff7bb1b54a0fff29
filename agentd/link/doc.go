// Package link keeps the host's tunnel to the control plane up: it dials, says
// hello, serves the host's handler on the streams that the control plane opens,
// and backs off when that fails. It renews the identity at two thirds of the
// certificate's life, by opening the next tunnel with the new certificate before
// it gives up the old one, and rejoins when the certificate expired meanwhile.
// A go-away is followed in the same way: make before break.
//
// Nothing ends Run but its context: a refusal that only a person can lift
// (revoked, no version in common) is retried slowly and told by State, because
// work on the host may go on without the link. One line is logged per change of
// state, not per attempt.
//
// Register is the one call for a host without an identity. The package knows
// the tunnel and the protocol; identity and handler are given to it. All methods
// of a Keeper may be called from any goroutine.
package link
