// Package pki is the control plane's certificate authority: it issues the
// agents' client certificates and the tunnel endpoint's own, and tells from a
// finished handshake who the peer is.
//
//	CA            ECDSA P-256, 10 years; its private key is in the store, sealed
//	              with the master key
//	master key    DIR/master.key (0600), made at the first start; see package masterkey
//	agent         24 h, clientAuth, one URI SAN postern://ORG/agent/AGENT and no
//	              other name, serial of 128 random bits
//	server        made in memory, serverAuth, DNS SAN ServerName
//
// One authority is active and issues; several may be trusted. Everything that
// verifies looks at all of them. A rotation (rotate.go) goes from stable to announced (the new one
// is trusted by all control planes, and issues nothing yet) to renewing (it issues; the old one
// still vouches for the endpoint to hosts that do not know the new one) and back to stable, each
// step one statement in the store, so that it goes on wherever it was cut off.
//
// The package verifies what is in a certificate. Whether its agent was revoked or
// the certificate replaced is for package registration to say, from the store.
// All methods may be called concurrently.
package pki
