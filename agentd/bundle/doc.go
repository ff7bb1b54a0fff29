// Package bundle makes support bundles: what somebody who helps needs to see of a host,
// without what is nobody's business. A Writer makes one .tar.gz; a Redactor takes secrets out of
// whatever goes in.
//
// The configuration is not searched for secrets: only what is known to be none is kept of it (numbers,
// switches, and the values of keys that Keep lists), so a key that is new is left out until somebody
// says that it may be in. Texts of which the shape is not known, logs first of all, have the values of
// the secrets that the configuration names taken out, and what looks like a password, a token or a key.
//
// It imports nothing of agentd's; package agentd puts it together with the rest. A Writer is for one
// goroutine, a Redactor for many once it is made.
package bundle
