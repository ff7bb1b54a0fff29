package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/postern-dev/postern/proto"
)

// fileWorkers are how many files are transferred at once.
const fileWorkers = 6

// transfer is a put or get of one or many files: workers, counts, and the line of progress.
type transfer struct {
	app   *app
	group *errgroup.Group
	ctx   context.Context
	line  *progress

	files, bytes      atomic.Int64 // settled
	totalFiles, total atomic.Int64 // known so far
	sent, same        atomic.Int64
	failed            atomic.Int64
	mu                sync.Mutex
	first             error // the first file's error
}

func (a *app) newTransfer(ctx context.Context, onTerminal bool) *transfer {
	t := &transfer{app: a}
	t.group, t.ctx = errgroup.WithContext(ctx)
	t.group.SetLimit(fileWorkers)
	t.line = beginProgress(a, onTerminal, t.text)
	return t
}

// text is "3 of 120 files  12.3 of 300.0 MiB  45.0 MiB/s  0:07".
func (t *transfer) text(_ *progress, d time.Duration) string {
	const mib = 1 << 20
	settled := t.bytes.Load()
	out := fmt.Sprintf("%.1f of %.1f MiB  %.1f MiB/s  %d:%02d", float64(settled)/mib, float64(t.total.Load())/mib,
		float64(settled)/mib/d.Seconds(), int(d.Minutes()), int(d.Seconds())%60)
	if n := t.totalFiles.Load(); n > 1 {
		out = fmt.Sprintf("%s of %s files  %s", grouped(t.files.Load()), grouped(n), out)
	}
	return out
}

// do transfers one file in one of the workers. Name is for people.
func (t *transfer) do(name string, f func(context.Context) error) {
	t.totalFiles.Add(1)
	t.group.Go(func() error {
		err := f(t.ctx)
		if err == nil {
			t.files.Add(1)
			return nil
		}
		return t.fail(name, err)
	})
}

// fail notes that a file was not transferred: others go on, unless they would fail in the same way.
func (t *transfer) fail(name string, err error) error {
	if t.ctx.Err() != nil {
		return t.ctx.Err()
	}
	t.mu.Lock()
	if t.first == nil {
		t.first = err
	}
	t.mu.Unlock()
	t.failed.Add(1)
	switch proto.CodeOf(err) {
	case proto.CodeUnauthenticated, proto.CodeRoleDenied, proto.CodePolicyDenied, proto.CodeStorageFull, proto.CodeUnavailable, proto.CodeRateLimited, proto.CodeOverloaded, proto.CodeCancelled:
		return err
	}
	if t.totalFiles.Load() > 1 {
		t.line.say("postern: %s: %s", safe(name), safe(message(err)))
	}
	return nil
}

// wait waits for all files, and tells how it went.
func (t *transfer) wait() error {
	err := t.group.Wait()
	t.line.stop()
	if err != nil {
		return err
	}
	switch failed := t.failed.Load(); {
	case failed == 0:
		return nil
	case t.totalFiles.Load() <= 1:
		return t.first
	default:
		return errors.New(grouped(failed) + " of " + grouped(t.totalFiles.Load()) + " files failed, see above: run it again for those")
	}
}
