// Package walls holds no code, only the tests that keep the house in order:
// which package may import which, a package comment everywhere, a check for
// left-over goroutines in every package that starts some, and documents that
// name what exists.
package walls
