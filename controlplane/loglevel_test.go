package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"sync"
	"syscall"
	"testing"
)

// lockedBuffer is a buffer for several goroutines.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func TestLogLevelBySignal(t *testing.T) {
	level := new(slog.LevelVar)
	level.Set(slog.LevelError)
	out := &lockedBuffer{}
	log := slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: level}))
	ctx, cancel := context.WithCancel(t.Context())
	done, ready := make(chan struct{}), make(chan struct{})
	go func() { defer close(done); followLevel(ctx, log, level, ready) }()
	<-ready
	// Each changes something that is waited for: the order of two signals under way is anybody's.
	for _, step := range []struct {
		signal syscall.Signal
		want   slog.Level
	}{{syscall.SIGUSR1, slog.LevelDebug}, {syscall.SIGUSR2, slog.LevelError}, {syscall.SIGUSR1, slog.LevelDebug}} {
		if err := syscall.Kill(syscall.Getpid(), step.signal); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the level", func() error {
			if got := level.Level(); got != step.want {
				return fmt.Errorf("got %v, want %v", got, step.want)
			}
			return nil
		})
	}
	cancel()
	<-done
}
