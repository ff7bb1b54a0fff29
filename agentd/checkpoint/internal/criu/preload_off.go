//go:build !posterncriushim

package criu

// preloadOfBuild is always empty in the product: nothing in its environment or its
// configuration puts foreign code into CRIU.
func preloadOfBuild() string { return "" }
