package token

import (
	"crypto/sha256"
	"sync"
	"time"
)

const (
	// cacheAge is how long a good token is not looked up again: so long a
	// revocation by another control plane may take to bite.
	cacheAge = 5 * time.Second
	// maxCache bounds the tokens kept. When it is full, all are forgotten.
	maxCache = 4096
)

// cache keeps tokens that proved good, by the hash of their text.
type cache struct {
	mu   sync.Mutex
	good map[[sha256.Size]byte]cached // guarded by mu
	// epoch counts calls of forget, so that an answer that was asked for before
	// is not kept after; guarded by mu.
	epoch uint64
}

type cached struct {
	principal Principal
	at        time.Time
}

func newCache() *cache { return &cache{good: map[[sha256.Size]byte]cached{}} }

func (c *cache) get(key [sha256.Size]byte, now time.Time) (Principal, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	entry, ok := c.good[key]
	age := now.Sub(entry.at)
	return entry.principal, ok && age >= 0 && age < cacheAge
}

func (c *cache) generation() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.epoch
}

func (c *cache) put(key [sha256.Size]byte, p Principal, now time.Time, generation uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.epoch != generation {
		return
	}
	if len(c.good) >= maxCache {
		clear(c.good)
	}
	c.good[key] = cached{p, now}
}

func (c *cache) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.epoch++
	clear(c.good)
}
