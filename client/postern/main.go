// Command postern is what people and scripts use of a control plane: it joins
// hosts (key), looks at them (agent, source), runs SQL on them (sql, query) and
// reads what was done (audit). docs/cli.md has every command with an example.
//
// Results go to stdout, everything else to stderr. The exit codes are 0 done,
// 1 failed, 2 usage, 3 denied by policy or role, 4 not found, 5 agent offline. No
// secret is taken from argv.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() { os.Exit(run()) }

func run() int {
	// A reader that went away (| head) is an error of write, not a signal: the
	// query is to be cancelled first.
	signal.Ignore(syscall.SIGPIPE)
	var signals []os.Signal
	for _, s := range []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(s) { // nohup, and background jobs of a script
			signals = append(signals, s)
		}
	}
	ctx, stop := context.Background(), context.CancelFunc(func() {})
	if len(signals) > 0 { // none would mean all
		ctx, stop = signal.NotifyContext(ctx, signals...)
	}
	defer stop()
	// The first Ctrl-C ends the work in order, the second one the process.
	context.AfterFunc(ctx, stop)
	a := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv}
	return a.run(ctx, os.Args[1:])
}
