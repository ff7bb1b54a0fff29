package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/proto"
)

const (
	// levelSocket is in the directory of a control plane that runs: who may open it may ask for
	// the level of its log, and set it. One line there, one line back.
	levelSocket = "level.sock"
	// levelTime bounds a question with its answer, maxLevelLine its length, and maxLevelCalls
	// how many are served at once.
	levelTime     = 5 * time.Second
	maxLevelLine  = 64
	maxLevelCalls = 8
)

// logLevels are the levels that can be asked for.
var logLevels = []string{"debug", "info", "warn", "error"}

func logLevelCommand() *cobra.Command {
	var data string
	cmd := &cobra.Command{
		Use:   "log-level --data DIR [debug|info|warn|error]",
		Short: "Show or set the level of the log of the control plane that runs on DIR",
		Long: `Show the level of the log of the control plane that runs on DIR, or set it at once. It
holds until the control plane is restarted: --log-level is in force then. Run it as the
user of that control plane, or as root; with several replicas, for each.`,
		Example: `  controlplane log-level --data /var/lib/postern
  controlplane log-level --data /var/lib/postern debug`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if data == "" {
				return usageError{errors.New("--data is missing: name the directory of the control plane")}
			}
			level := strings.Join(args, "")
			if level != "" && !slices.Contains(logLevels, level) {
				return usageError{fmt.Errorf("%q is none of %s", level, strings.Join(logLevels, ", "))}
			}
			now, err := askLevel(cmd.Context(), data, level)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), now)
			return err
		},
	}
	cmd.Flags().StringVar(&data, "data", "", "its directory")
	return cmd
}

// askLevel returns the level of the control plane that runs on a directory, after it was set
// to level, if that is not empty.
func askLevel(ctx context.Context, data, level string) (string, error) {
	path, done, err := socketPath(data)
	if errors.Is(err, fs.ErrNotExist) {
		return "", proto.Errorf(proto.CodeNotFound, "--data %s: no control plane has run there", data)
	} else if err != nil {
		return "", fmt.Errorf("--data: %w", err)
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, levelTime)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return "", proto.Errorf(proto.CodeNotFound, "--data %s: no control plane runs there, or one of a version before this command", data)
	case errors.Is(err, fs.ErrPermission):
		return "", fmt.Errorf("ask the control plane on %s: permission denied: run this as its user or as root", data)
	case err != nil:
		return "", fmt.Errorf("ask the control plane on %s: %w", data, err)
	}
	defer conn.Close() //nolint:errcheck // the answer counts
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := fmt.Fprintln(conn, level); err != nil {
		return "", fmt.Errorf("ask the control plane on %s: %w", data, err)
	}
	answer, err := bufio.NewReader(io.LimitReader(conn, maxLevelLine)).ReadString('\n')
	answer = strings.TrimSuffix(answer, "\n")
	if err != nil || !slices.Contains(logLevels, answer) {
		return "", fmt.Errorf("the control plane on %s gave no answer: its log says why", data)
	}
	return answer, nil
}

// socketPath is the socket's path in a directory, by way of a descriptor of it: the path of
// a socket may have some hundred bytes, a directory's more. done is to be called after its use.
func socketPath(data string) (path string, done func(), err error) {
	dir, err := os.Open(data)
	if err != nil {
		return "", nil, err
	}
	path = fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), levelSocket)
	if _, err := os.Stat(filepath.Dir(path)); err != nil {
		path = filepath.Join(data, levelSocket)
	}
	return path, func() { _ = dir.Close() }, nil
}

// serveLevel answers askLevel on a directory of which the caller holds the lock, until stop is
// called, which waits.
func serveLevel(data string, log *slog.Logger, level *slog.LevelVar) (stop func(), err error) {
	path, done, err := socketPath(data)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // the path is good while done was not called
	if err := os.Chmod(filepath.Join(data, levelSocket), 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, maxLevelCalls)
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			} else if err != nil {
				time.Sleep(100 * time.Millisecond) // no descriptors are left: for the moment
				continue
			}
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { _ = conn.Close(); <-slots }()
				_ = conn.SetDeadline(time.Now().Add(levelTime))
				answerLevel(conn, log, level)
			})
		}
	})
	return func() {
		_ = l.Close()
		_ = os.Remove(filepath.Join(data, levelSocket))
		wg.Wait()
	}, nil
}

func answerLevel(conn io.ReadWriter, log *slog.Logger, level *slog.LevelVar) {
	line, err := bufio.NewReader(io.LimitReader(conn, maxLevelLine)).ReadString('\n')
	text := strings.TrimSuffix(line, "\n")
	if err != nil || text != "" && !slices.Contains(logLevels, text) {
		return
	}
	if text != "" {
		var to slog.Level
		if err := to.UnmarshalText([]byte(text)); err != nil {
			return
		}
		setLevel(log, level, to)
	}
	fmt.Fprintln(conn, strings.ToLower(level.Level().String())) //nolint:errcheck // who asked is gone
}

// setLevel changes the level and says so, at the more talkative of the two.
func setLevel(log *slog.Logger, level *slog.LevelVar, to slog.Level) {
	if was := level.Level(); was != to {
		log.Warn("log level changed", "from", strings.ToLower(was.String()), "to", strings.ToLower(to.String()))
		level.Set(to)
	}
}
