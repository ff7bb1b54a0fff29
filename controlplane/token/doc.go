// Package token makes and checks the API tokens.
//
//	pst1_<id>_<secret and checksum>
//
// The id is public (26 characters), the rest 32 random bytes and 4 bytes of
// checksum in base 32, so a mistyped token is told from an unknown one without a
// look-up. Only the SHA-256 of the secret is stored; the secret is random, so a
// slow hash would add nothing.
//
// A token belongs to one organization and has one role: viewer, analyst, operator
// or admin, each of which may do all that those before it may. What a role may do
// is for package api to say. All methods may be called concurrently.
package token
