package ratelimit

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

func TestLimiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(1, 3)
		for range 3 {
			if l.Exhausted("a") || !l.Allow("a") {
				t.Fatal("the burst is not granted")
			}
		}
		if !l.Exhausted("a") || l.Allow("a") {
			t.Error("more than the burst is granted")
		}
		if l.Exhausted("b") || !l.Allow("b") {
			t.Error("another key is bounded too")
		}
		time.Sleep(time.Second)
		if l.Exhausted("a") || !l.Allow("a") || l.Allow("a") {
			t.Error("a second later, not exactly one is granted")
		}
	})
}

func TestMemoryIsBounded(t *testing.T) {
	l := New(1e-9, 2)
	for i := range 3 * maxBuckets {
		l.Take(fmt.Sprint(i))
	}
	if len(l.buckets) > maxBuckets {
		t.Errorf("%d buckets, want at most %d", len(l.buckets), maxBuckets)
	}
}
