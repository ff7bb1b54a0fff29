package checkpoint

import (
	"context"

	"github.com/postern-dev/postern/agentd/checkpoint/internal/criu"
)

// HelperArg is the hidden command of agentd that HelperMain serves; it must do nothing
// else first.
const HelperArg = criu.HelperArg

// Finding is what Examine says of one thing: OK, a lesser fault that costs speed or a
// feature, or a fault without which no checkpoint can be made. Remedy is empty when OK.
type Finding struct {
	Name            string
	OK, Lesser      bool
	Message, Remedy string
}

// Examine looks at what checkpoints need of this host, for agentd doctor; it changes
// nothing and takes at most a minute. path is CRIU's by the configuration, or empty.
func Examine(ctx context.Context, path string) []Finding {
	var all []Finding
	for _, f := range criu.Examine(ctx, path, "/proc/self/exe") {
		all = append(all, Finding{Name: f.Name, OK: f.Grade == criu.Fine, Lesser: f.Grade == criu.Lesser, Message: f.Message, Remedy: f.Remedy})
	}
	return all
}
