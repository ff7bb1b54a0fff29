// Package masterkey keeps the control plane's master keys and seals with them.
//
//	ring      the keys of DIR/master.key: one seals, the others still open what they sealed
//	first     the key that an installation was made with. Its id is "1", and what it seals bears
//	          none, as in versions that knew but one key
//	id        of any other key: 16 hexadecimal digits derived from it, which tell nothing of it
//	purpose   each purpose has a key of its own, derived (HKDF-SHA-256) from a master key
//
// The file holds the 32 bytes of the first key as long as it is alone, and JSON afterwards (Ring.Encode).
// What is sealed with the first key is a nonce and AES-256-GCM's text; with any other one
//
//	8 bytes "PSTNKEY1" | 8 bytes id | 12 bytes nonce | text and tag
//
// KeyOf tells which it is, without any key.
//
// Which key seals is decided in the store, for all control planes of an installation (Keys.Use); this
// package knows nothing of that. Keys may be used by several goroutines, and a ring is never changed. The
// package imports nothing of the control plane's others, which may import it.
package masterkey
