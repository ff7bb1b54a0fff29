// Package regkey reads and writes registration keys, the text that a host needs
// once to join:
//
//	prk1_ base32(id 10 bytes, secret 32 bytes, fingerprint 32 bytes, checksum 4 bytes)
//
// base32 is RFC 4648's in lower case without padding, so a key is one word that a
// double click selects, 125 + 5 characters long. The checksum is the first four
// bytes of SHA-256 over the rest and tells a garbled key from an unknown one. The
// control plane stores only a hash of the secret. Both sides import it.
package regkey
