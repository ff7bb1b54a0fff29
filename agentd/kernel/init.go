package kernel

import "github.com/postern-dev/postern/agentd/kernel/internal/sandbox"

// InitArg is agentd's first argument in the process that becomes a kernel's init.
const InitArg = sandbox.InitArg

// InitMain is that process. It returns an exit code only if something failed;
// nothing else may be done before it.
func InitMain() int { return sandbox.InitMain() }
