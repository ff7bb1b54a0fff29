package kernel

import "github.com/postern-dev/postern/agentd/kernel/internal/shim"

// ShimArg is agentd's first argument in a kernel's shim; the kernel's directory
// follows.
const ShimArg = shim.Arg

// ShimMain is that process, with the arguments after ShimArg; it returns its exit code.
func ShimMain(args []string) int { return shim.Main(args) }
