package ratelimit

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// maxBuckets bounds a Limiter's memory, at about 150 bytes each.
const maxBuckets = 10_000

// Limiter is a token bucket for each key: a burst at once, then so many a second.
// All methods may be called concurrently.
type Limiter struct {
	rate  rate.Limit
	burst int

	mu      sync.Mutex
	buckets map[string]*rate.Limiter // guarded by mu
}

// New returns a limiter whose buckets are full.
func New(perSecond float64, burst int) *Limiter {
	return &Limiter{rate: rate.Limit(perSecond), burst: burst, buckets: map[string]*rate.Limiter{}}
}

// Allow takes one from the key's bucket; false if there is none.
func (l *Limiter) Allow(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bucketLocked(key).Allow()
}

// Take takes one from the key's bucket, if there is one.
func (l *Limiter) Take(key string) { l.Allow(key) }

// Exhausted reports whether the key's bucket is empty, and takes nothing.
func (l *Limiter) Exhausted(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.buckets[key]
	return b != nil && b.Tokens() < 1
}

func (l *Limiter) bucketLocked(key string) *rate.Limiter {
	b := l.buckets[key]
	if b == nil {
		if len(l.buckets) >= maxBuckets {
			l.sweepLocked(time.Now())
		}
		b = rate.NewLimiter(l.rate, l.burst)
		l.buckets[key] = b
	}
	return b
}

// sweepLocked drops the buckets that are full again, which are as good as new,
// and if none is, any quarter: an attacker with that many addresses is not
// stopped by buckets.
func (l *Limiter) sweepLocked(now time.Time) {
	for key, b := range l.buckets {
		if b.TokensAt(now) >= float64(l.burst) {
			delete(l.buckets, key)
		}
	}
	for key := range l.buckets {
		if len(l.buckets) <= maxBuckets*3/4 {
			return
		}
		delete(l.buckets, key)
	}
}
