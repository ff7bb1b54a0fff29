package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// followLevel changes the level until ctx ends: SIGUSR1 makes it debug, SIGUSR2 the one that the process was
// started with. It closes ready once it listens.
func followLevel(ctx context.Context, log *slog.Logger, level *slog.LevelVar, ready chan<- struct{}) {
	start := level.Level()
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)
	close(ready)
	for {
		select {
		case <-ctx.Done():
			return
		case s := <-signals:
			to := start
			if s == syscall.SIGUSR1 {
				to = slog.LevelDebug
			}
			setLevel(log, level, to)
		}
	}
}
