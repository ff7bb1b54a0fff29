//go:build !linux

package main

import "log/slog"

func harden(*slog.Logger) {}
