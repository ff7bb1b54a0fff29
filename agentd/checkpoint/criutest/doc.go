// Package criutest is what tests need to run a real CRIU: its path, and on machines
// without CAP_SYS_RESOURCE (CI's) a library that is loaded into it.
//
// Only tests import it; the product has no way to load anything into CRIU.
package criutest
