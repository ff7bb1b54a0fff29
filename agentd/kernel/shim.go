package kernel

import "github.com/postern-dev/postern/agentd/kernel/internal/shim"

// ShimArg is agentd's first argument in a kernel's shim; the kernel's directory
// follows.
const ShimArg = shim.Arg

// CRIU saves and restores a kernel's processes, in its shim.
type CRIU = shim.CRIU

// ShimMain is that process, with the arguments after ShimArg; it returns its exit code.
// Without a CRIU there are no checkpoints.
func ShimMain(args []string, criu CRIU) int { return shim.Main(args, criu) }
