// Package restoretest holds no code, only tests that need two neighbours at once: real
// kernels in their sandbox, and package checkpoint, which dumps and restores them with
// a real CRIU. Neither may import the other.
package restoretest
