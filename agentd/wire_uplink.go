package main

import (
	"log/slog"

	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/uplink"
)

// newUplinks starts the processes that make the tunnels' connections. executable is
// for tests; "" means this program.
func newUplinks(executable string, c *config.Config, logger *slog.Logger) *uplink.Starter {
	return uplink.New(uplink.Config{Executable: executable, UID: c.SQL.UIDBase + uplink.UIDs, OuterCAs: c.OuterCAs, Logger: logger})
}
