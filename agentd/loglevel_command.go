package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/agentd/control"
)

// logLevels are the levels that can be asked for.
var logLevels = []string{"debug", "info", "warn", "error"}

func newLogLevel() *cobra.Command {
	var p places
	cmd := &cobra.Command{
		Use:   "log-level [debug|info|warn|error]",
		Short: "show or set the level of the running agentd's log",
		Long: `Show the level of the running agentd's log, or set it at once. It holds until agentd reads its
configuration again (systemctl reload agentd) or is restarted: log.level is in force then.`,
		Example: "  agentd log-level\n  sudo agentd log-level debug",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usagef("one level at most")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			level := strings.Join(args, "")
			if level != "" {
				if _, err := parseLevel(level); err != nil {
					return usageError{err.Error()}
				}
			}
			ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
			defer cancel()
			now, err := control.AskLevel(ctx, p.runtimeDir(), level)
			if errors.Is(err, control.ErrNotRunning) {
				return errors.New("agentd is not running: set log.level in its configuration")
			} else if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), now)
			return err
		},
	}
	p.flags(cmd, "runtime")
	return cmd
}

func parseLevel(text string) (slog.Level, error) {
	for _, known := range logLevels {
		if text == known {
			var level slog.Level
			err := level.UnmarshalText([]byte(text))
			return level, err
		}
	}
	return 0, fmt.Errorf("%q is none of %s", text, strings.Join(logLevels, ", "))
}

// setLevel implements control.Config's Level.
func (d *Daemon) setLevel(text string) (string, error) {
	if text != "" {
		level, err := parseLevel(text)
		if err != nil {
			return "", err
		}
		if was := d.level.Level(); was != level {
			// Told at both levels, so that the log itself says from when on it says less or more.
			d.logger.Warn("log level changed", "from", strings.ToLower(was.String()), "to", text)
			d.level.Set(level)
		}
	}
	return strings.ToLower(d.level.Level().String()), nil
}
