package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/postern-dev/postern/agentd/footprint"
)

// smallAfter is when the pages of the program that the start needed are given back, and smallEvery how
// often those that something else did.
const (
	smallAfter = 10 * time.Second
	smallEvery = time.Minute
)

// staySmall gives pages of the program back while no statement runs, until ctx ends.
func (d *Daemon) staySmall(ctx context.Context) {
	keepSmall(ctx, d.logger, func() bool { return d.host.Running() == 0 })
}

// keepSmall gives pages of the program back while idle says so, until ctx ends. mountd does it whatever it is
// doing: what it uses is mapped again at the cost of some hundred page faults a minute.
func keepSmall(ctx context.Context, logger *slog.Logger, idle func() bool) {
	if err := footprint.Keep(ctx, smallAfter, smallEvery, idle); err != nil {
		logger.Info("pages of the program stay mapped", "err", err)
	}
}
