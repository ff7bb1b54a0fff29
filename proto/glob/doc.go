// Package glob matches names with patterns: * is any text, ? any one character,
// everything else is itself. Case counts, as it does in a catalog.
package glob
