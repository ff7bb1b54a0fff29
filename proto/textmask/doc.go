// Package textmask hides in texts what matches patterns (RE2): card numbers,
// addresses and the like, in plain text, in JSON without breaking it, and in
// XML.
//
// A [Set] is made once of all patterns of a data source; it is safe for
// concurrent use. Most texts hold nothing of what the patterns are after, so
// each pattern is asked what its matches must contain, and only texts that have
// that are searched.
//
// agentd uses it on values, statements and errors before they leave the host,
// the control plane on what it stores.
package textmask
