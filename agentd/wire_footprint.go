package main

import (
	"context"
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
	if err := footprint.Keep(ctx, smallAfter, smallEvery, func() bool { return d.host.Running() == 0 }); err != nil {
		d.logger.Info("pages of the program stay mapped", "err", err)
	}
}
