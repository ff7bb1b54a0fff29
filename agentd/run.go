package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/secret"
	"github.com/postern-dev/postern/proto"
)

func newRun() *cobra.Command {
	level := new(slog.LevelVar)
	d := NewDaemon(nil, level)
	cmd := &cobra.Command{
		Use:   "run",
		Short: "run the daemon (what the systemd unit starts)",
		Long: `Run the daemon: keep the tunnel to the control plane up and answer what the configuration
allows. SIGHUP reads the configuration again; SIGTERM lets running statements finish (25 s at
most), a second one ends them at once.`,
		Example: "  agentd run --config /etc/postern/agentd.yaml",
		Args:    noArgs,
		RunE:    func(*cobra.Command, []string) error { return runDaemon(d) },
	}
	d.Flags(cmd)
	return cmd
}

func runDaemon(d *Daemon) error {
	c, _, err := d.loadConfig()
	if err != nil {
		return err
	}
	var names []string
	for _, s := range c.Sources {
		if s.Password.Env != "" {
			names = append(names, s.Password.Env)
		}
	}
	for _, b := range c.Buckets {
		for _, ref := range b.Refs() {
			if ref.Env != "" {
				names = append(names, ref.Env)
			}
		}
	}
	for _, ref := range []secret.Ref{c.Vault.Token, c.Vault.SecretID, c.MaskKey} {
		if ref.Env != "" {
			names = append(names, ref.Env)
		}
	}
	if d.secrets, err = secret.CaptureEnv(names...); err != nil {
		return err
	}
	d.logger = newLogger(c.Log.Format, d.level, os.Stderr)
	harden(d.logger)
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)
	if stopped, err := joinUnless(d, signals); err != nil || stopped {
		return err
	}
	if err := d.Validate(); err != nil {
		return err
	}
	a := d.identity.Agent()
	d.logger.Info("starting", "version", proto.Software(), "agent", a.Name, "agent_id", a.AgentID, "organization", a.Organization)
	d.Notify = func(state string) {
		if err := notifySystemd(state); err != nil {
			d.logger.Warn("systemd not told", "err", err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error, 1)
	readied := make(chan struct{})
	go func() { ended <- d.Run(ctx, func() { close(readied) }) }()

	watchdog, alive, stop := watchdog(d)
	defer stop()
	terminations := 0
	for {
		select {
		case err := <-ended:
			return err
		case <-readied:
			readied = nil
			d.Notify("READY=1")
		case <-watchdog:
			if readied == nil {
				alive()
			}
		case s := <-signals:
			switch {
			case s == syscall.SIGHUP && readied == nil && terminations == 0:
				d.Notify("RELOADING=1\n" + monotonic())
				d.Reload() //nolint:errcheck // told in the log; the old configuration stays
				d.Notify("READY=1")
			case s == syscall.SIGHUP:
			default:
				terminations++
				if terminations == 1 {
					cancel()
				} else {
					d.Abort()
				}
			}
		}
	}
}

func monotonic() string {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		return ""
	}
	return fmt.Sprintf("MONOTONIC_USEC=%d", t.Nano()/1000)
}

// watchdog is for telling systemd that the daemon is alive, well within its
// patience: its subsystems answer, not only this loop.
func watchdog(d *Daemon) (tick <-chan time.Time, alive func(), stop func()) {
	patience, err := sd.SdWatchdogEnabled(false)
	if err != nil || patience <= 0 {
		return nil, nil, func() {}
	}
	ticker := time.NewTicker(patience / 4)
	answers := make(chan struct{}, 1)
	asking := false
	return ticker.C, func() {
		select {
		case <-answers:
			asking = false
			d.Notify(watchdogState)
		default:
		}
		if asking {
			return // it hangs: systemd ends it unless it answers in time
		}
		asking = true
		go func() { // hangs if a subsystem does, and then the process is ended
			d.status()
			d.host.Running()
			answers <- struct{}{}
		}()
	}, ticker.Stop
}

// harden keeps the daemon's memory out of core files and away from debuggers of
// the same user. It must come after secret.CaptureEnv, which writes to it.
func harden(logger *slog.Logger) {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		logger.Warn("core files not switched off", "err", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		logger.Warn("memory not hidden from debuggers", "err", err)
	}
}
