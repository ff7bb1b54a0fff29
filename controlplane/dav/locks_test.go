package dav

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/net/webdav"
)

// TestLocksAreBounded holds more locks than an organization may, with more time than it may.
func TestLocksAreBounded(t *testing.T) {
	l := &locks{inner: webdav.NewMemLS(), held: map[string]time.Time{}}
	now := time.Now()
	var tokens []string
	for i := range MaxLocks {
		token, err := l.Create(now, webdav.LockDetails{Root: fmt.Sprintf("/w/%d", i), Duration: -1, ZeroDepth: true})
		if err != nil {
			t.Fatal(err)
		}
		tokens = append(tokens, token)
	}
	more := webdav.LockDetails{Root: "/w/more", Duration: -1, ZeroDepth: true}
	if _, err := l.Create(now, more); !errors.Is(err, errTooManyLocks) {
		t.Errorf("one more: %v", err)
	}
	if err := l.Unlock(now, tokens[0]); err != nil {
		t.Fatal(err)
	}
	token, err := l.Create(now, more)
	if err != nil {
		t.Errorf("after an unlock: %v", err)
	}
	if d, err := l.Refresh(now, token, 100*time.Hour); err != nil || d.Duration != LockTime {
		t.Errorf("refreshed for %v, %v: want %v", d.Duration, err, LockTime)
	}
	// All have ended by now.
	if _, err := l.Create(now.Add(LockTime+time.Second), webdav.LockDetails{Root: "/w/later", Duration: time.Minute}); err != nil {
		t.Errorf("after their time: %v", err)
	}
	if len(l.held) != 1 {
		t.Errorf("%d locks are held", len(l.held))
	}
}
