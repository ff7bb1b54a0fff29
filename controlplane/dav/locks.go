package dav

import (
	"errors"
	"sync"
	"time"

	"golang.org/x/net/webdav"
)

// errTooManyLocks is returned when an organization holds MaxLocks.
var errTooManyLocks = errors.New("too many locks")

// locks are an organization's, with bounds for their number and time.
type locks struct {
	inner webdav.LockSystem

	mu   sync.Mutex           // guards held; never held during a call of inner
	held map[string]time.Time // when each ends
}

var _ webdav.LockSystem = (*locks)(nil)

// Confirm implements webdav.LockSystem.
func (l *locks) Confirm(now time.Time, name0, name1 string, conditions ...webdav.Condition) (func(), error) {
	return l.inner.Confirm(now, name0, name1, conditions...)
}

// Create implements webdav.LockSystem.
func (l *locks) Create(now time.Time, details webdav.LockDetails) (string, error) {
	if details.Duration < 0 || details.Duration > LockTime {
		details.Duration = LockTime
	}
	l.mu.Lock()
	if len(l.held) >= MaxLocks {
		for token, ends := range l.held {
			if ends.Before(now) {
				delete(l.held, token)
			}
		}
	}
	full := len(l.held) >= MaxLocks
	l.mu.Unlock()
	if full {
		return "", errTooManyLocks
	}
	token, err := l.inner.Create(now, details)
	if err == nil {
		l.mu.Lock()
		l.held[token] = now.Add(details.Duration)
		l.mu.Unlock()
	}
	return token, err
}

// Refresh implements webdav.LockSystem.
func (l *locks) Refresh(now time.Time, token string, duration time.Duration) (webdav.LockDetails, error) {
	if duration < 0 || duration > LockTime {
		duration = LockTime
	}
	details, err := l.inner.Refresh(now, token, duration)
	if err == nil {
		l.mu.Lock()
		l.held[token] = now.Add(duration)
		l.mu.Unlock()
	}
	return details, err
}

// Unlock implements webdav.LockSystem.
func (l *locks) Unlock(now time.Time, token string) error {
	err := l.inner.Unlock(now, token)
	if err == nil || errors.Is(err, webdav.ErrNoSuchLock) {
		l.mu.Lock()
		delete(l.held, token)
		l.mu.Unlock()
	}
	return err
}
