package audit

import (
	"context"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/proto/auditchain"
)

const (
	// SoonDelay is how long an entry of AppendSoon may take to be on stable storage:
	// that much a loss of power can take. The death of agentd takes nothing.
	SoonDelay = 100 * time.Millisecond
	// maxUnsynced is how many bytes of such entries there may be; then they are put on
	// stable storage at once.
	maxUnsynced = 4 << 20
)

// AppendSoon adds an entry at the end of the chain and returns when the kernel has
// it: it survives agentd, and is on stable storage SoonDelay later. An entry that was
// accepted is written again, before any other, if the disk fails meanwhile.
func (l *Log) AppendSoon(_ context.Context, entry auditchain.Entry) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	if l.ended {
		return ErrClosed
	}
	if err := l.ready(); err != nil {
		return l.coded(err)
	}
	if entry.Time.IsZero() {
		entry.Time = l.cfg.Now()
	}
	head := entry.Seal(l.tip)
	line := append(entry.Encode(), '\n')
	if err := l.writeOut(line); err != nil {
		l.undo()
		return l.coded(err)
	}
	l.tip = head
	l.size += int64(len(line))
	l.unsynced = append(l.unsynced, line...)
	l.mu.Lock()
	l.entries++
	l.bytes += int64(len(line))
	l.mu.Unlock()
	if len(l.unsynced) > maxUnsynced {
		if err := l.sync(); err != nil {
			l.suspect = true
			return l.coded(err)
		}
	}
	l.arm()
	return nil
}

// arm has the committer sync soon, if there is anything to sync. The timer needs no
// end: all that it does is to wake a committer that may have gone.
func (l *Log) arm() {
	if len(l.unsynced) == 0 || l.armed {
		return
	}
	l.armed = true
	time.AfterFunc(SoonDelay/2, func() {
		select {
		case l.syncSoon <- struct{}{}:
		default:
		}
	})
}

// sync puts everything on stable storage; the caller holds the file.
func (l *Log) sync() error {
	if err := l.fault("fsync"); err != nil {
		return err
	}
	if err := unix.Fdatasync(int(l.file.Fd())); err != nil {
		return err
	}
	l.synced()
	return nil
}

// synced notes that everything is on stable storage.
func (l *Log) synced() {
	l.unsynced = nil
	l.generation++
	l.mu.Lock()
	l.head = l.tip
	l.mu.Unlock()
}

// syncLater is the committer's: it puts what AppendSoon wrote on stable storage,
// without keeping others from writing meanwhile.
func (l *Log) syncLater() {
	l.writing.Lock()
	l.armed = false
	n, tip, generation := len(l.unsynced), l.tip, l.generation
	if n == 0 || l.suspect {
		l.writing.Unlock()
		return
	}
	fd, err := unix.FcntlInt(l.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	l.writing.Unlock()
	if err == nil {
		if err = l.fault("fsync"); err == nil {
			err = unix.Fdatasync(fd)
		}
		unix.Close(fd) //nolint:errcheck // it was synced
	}
	l.writing.Lock()
	defer l.writing.Unlock()
	if l.generation != generation {
		return // somebody else did it
	}
	if err != nil {
		l.suspect = true // written again before the next entry
		l.logger.Error("audit entries not on stable storage yet", "bytes", n, "err", err)
		return
	}
	l.unsynced = append([]byte(nil), l.unsynced[n:]...)
	l.mu.Lock()
	l.head = tip
	l.mu.Unlock()
	l.arm()
}
