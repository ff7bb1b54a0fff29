//go:build posterncriushim

package criu

import (
	"os"
	"path/filepath"
)

// preloadOfBuild is for end-to-end tests that build agentd with the tag
// posterncriushim, on machines without CAP_SYS_RESOURCE: the library criu-preload.so
// beside the program, if it is there.
func preloadOfBuild() string {
	self, err := os.Executable()
	if err != nil {
		return ""
	}
	lib := filepath.Join(filepath.Dir(self), "criu-preload.so")
	if _, err := os.Stat(lib); err != nil {
		return ""
	}
	return lib
}
