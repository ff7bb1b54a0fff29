//go:build posterncriushim

package criu

import "os"

// preloadOfBuild is for end-to-end tests that build agentd with the tag
// posterncriushim, on machines without CAP_SYS_RESOURCE.
func preloadOfBuild() string { return os.Getenv("POSTERN_TEST_CRIU_PRELOAD") }
