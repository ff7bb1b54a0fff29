package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/proto"
)

// drainPoll is how often it is looked at whether the control plane has ended.
const drainPoll = 50 * time.Millisecond

func drainCommand() *cobra.Command {
	var data string
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "drain --data DIR",
		Short: "Stop the control plane that runs on DIR, and wait until it has ended",
		Long: `Stop the control plane that runs on DIR, as SIGTERM does, and wait until it has ended:
agents move to other replicas, what is under way may end within the --drain-timeout
that it was started with. Run it as the user of that control plane, or as root. A
service manager may start it again.`,
		Example: `  controlplane drain --data /var/lib/postern`,
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if data == "" {
				return usageError{errors.New("--data is missing: name the directory of the control plane to stop")}
			}
			ctx := cmd.Context()
			if wait > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, wait)
				defer cancel()
			}
			return drainOther(ctx, data)
		},
	}
	cmd.Flags().StringVar(&data, "data", "", "its directory")
	cmd.Flags().DurationVar(&wait, "wait", 0, "how long to wait at most; 0: until it has ended")
	return cmd
}

// drainOther asks the process that holds the lock of a directory to stop and waits until
// the lock is free. It makes nothing.
func drainOther(ctx context.Context, data string) error {
	lock, err := os.OpenFile(filepath.Join(data, lockName), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return proto.Errorf(proto.CodeNotFound, "--data %s: no control plane has run there", data)
	}
	if err != nil {
		return fmt.Errorf("--data: %w", err)
	}
	defer lock.Close() //nolint:errcheck // it was only for the lock
	told := false
	for {
		switch err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); {
		case err == nil && told:
			return nil
		case err == nil:
			return proto.Errorf(proto.CodeNotFound, "--data %s: no control plane runs there", data)
		case !errors.Is(err, syscall.EWOULDBLOCK):
			return fmt.Errorf("--data %s: %w", data, err)
		}
		if !told {
			// Who holds the lock has written its pid after taking it.
			text, err := os.ReadFile(lock.Name())
			if err != nil {
				return fmt.Errorf("--data: %w", err)
			}
			pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
			if err == nil && pid > 1 {
				if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
					return fmt.Errorf("stop the control plane on %s, process %d: %w: run this as its user or as root", data, pid, err)
				}
				told = true
			}
		}
		select {
		case <-time.After(drainPoll):
		case <-ctx.Done():
			return fmt.Errorf("the control plane on %s has not ended yet: its log says what it waits for", data)
		}
	}
}
