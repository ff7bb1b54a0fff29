// Package pki is the control plane's certificate authority: it issues the
// agents' client certificates and the tunnel endpoint's own, and tells from a
// finished handshake who the peer is.
//
//	CA            ECDSA P-256, 10 years; its private key is in the store, sealed
//	              with the master key
//	master key    32 random bytes in DIR/master.key (0600), made at the first start
//	agent         24 h, clientAuth, one URI SAN postern://ORG/agent/AGENT and no
//	              other name, serial of 128 random bits
//	server        made in memory, serverAuth, DNS SAN ServerName
//
// One authority is active and issues; several may be trusted. Everything that
// verifies looks at all of them, so a rotation needs no change here.
//
// The package verifies what is in a certificate. Whether its agent was revoked or
// the certificate replaced is for package registration to say, from the store.
// All methods may be called concurrently.
package pki
