package kernel

import (
	"context"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
)

// Finding is what Examine says of one thing: OK, a lesser fault that costs a limit or
// a feature, or a fault without which no kernel starts. Remedy is empty when OK.
type Finding struct {
	Name            string
	OK, Lesser      bool
	Message, Remedy string
}

// Needs are what Examine looks for.
type Needs struct {
	// UIDBase and UIDs are the range of kernels' users. The last one is Examine's own.
	UIDBase, UIDs uint32
	// SpecDirs are where kernelspecs are; empty means Jupyter's system directories.
	SpecDirs []string
	// Visible are paths that kernels see beside /usr and /opt.
	Visible []string
}

// systemSpecDirs are Jupyter's directories for all users, the first wins.
var systemSpecDirs = []string{"/usr/local/share/jupyter/kernels", "/usr/share/jupyter/kernels"}

// Examine tries what kernels need of this host, for agentd doctor: it starts
// sandboxes and leaves nothing behind. The context bounds it.
func Examine(ctx context.Context, n Needs) []Finding {
	dirs := n.SpecDirs
	if len(dirs) == 0 {
		dirs = systemSpecDirs
	}
	var all []Finding
	for _, c := range sandbox.Prerequisites(ctx, sandbox.Needs{UIDBase: n.UIDBase, UIDs: n.UIDs, SpecDirs: dirs, Visible: n.Visible}) {
		all = append(all, Finding{Name: c.Name, OK: c.OK, Lesser: c.Lesser, Message: c.Message, Remedy: c.Remedy})
	}
	return all
}
