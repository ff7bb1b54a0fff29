// Package filekey keeps the keys with which the contents of files are sealed in the object store.
//
//	key          64 random bytes: 32 seal (AES-256-GCM), 32 make the objects' names (HMAC-SHA-256)
//	generation   each organization has keys of its own, numbered from 1; the newest one seals, the others open
//	             what they sealed until that is sealed anew (package blob) and the key is dropped
//	at rest      in the store, sealed with a master key and bound to organization and generation
//
// The first generation of an organization is derived from the installation's first master key while that is there: what
// versions without generations stored is sealed with it. It is kept like the others, so that the first master key can go.
//
// A Service may be used by several goroutines, and by several control planes on one store. It remembers at most 10,000 keys.
// The package imports nothing of the control plane's others but masterkey.
package filekey
