package replica

import (
	"context"
	"log/slog"
	"sync"
	"syscall"
	"time"
)

// Lines of one kind that the log gets in a window: a disk or a link that is gone fails every request.
const (
	limitLines  = 20
	limitWindow = time.Minute
)

// limit keeps what fails often from filling the log. The zero value is ready.
type limit struct {
	mu    sync.Mutex
	since time.Time
	lines int
	// withheld counts the lines that were not written in windows before and in this one.
	withheld int
}

// allow tells whether to write a line, and how many were not written since the last one.
func (l *limit) allow(now time.Time) (ok bool, withheld int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.since) >= limitWindow || now.Before(l.since) {
		l.since, l.lines = now, 0
	}
	if l.lines >= limitLines {
		l.withheld++
		return false, 0
	}
	l.lines++
	withheld, l.withheld = l.withheld, 0
	return true, withheld
}

// limits are the limits of a replica's log, one for each message.
type limits struct{ at sync.Map } // string → *limit

// refuse is EIO, with the reason in the log: who gets the errno cannot know it.
func (r *Replica) refuse(msg string, id uint64, err error) error {
	r.say(slog.LevelError, msg, "node", id, "err", err)
	return syscall.EIO
}

// say writes a line that may be repeated often, at most limitLines a minute of each message.
func (r *Replica) say(level slog.Level, msg string, args ...any) {
	l, _ := r.limits.at.LoadOrStore(msg, &limit{})
	ok, withheld := l.(*limit).allow(time.Now())
	if !ok {
		return
	}
	if withheld > 0 {
		args = append(args, "withheld", withheld)
	}
	r.log.Log(context.Background(), level, msg, args...)
}
