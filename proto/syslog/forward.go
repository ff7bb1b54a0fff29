package syslog

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto/auditchain"
)

const (
	// Settle is how long a connection has to live on after the server's kernel took an entry for it to count
	// as delivered.
	Settle = time.Second
	// pageEntries is how many entries are read at once.
	pageEntries = 500
	// lookEvery is how often it is looked for new entries.
	lookEvery = 500 * time.Millisecond
	// firstPause and longestPause are between tries that fail.
	firstPause, longestPause = 500 * time.Millisecond, 30 * time.Second
)

// Chain is a hash chain that is forwarded. Its methods are called by one goroutine.
type Chain interface {
	// After returns encoded entries whose numbers are above after, ascending and from the first that is there,
	// at most limit and some MiB; no entries mean the end.
	After(ctx context.Context, after uint64, limit int) ([][]byte, error)
	// Position is the last entry that the server has; zero: none.
	Position(ctx context.Context) (auditchain.Head, error)
	// Keep keeps that on stable storage.
	Keep(ctx context.Context, h auditchain.Head) error
}

// Config is what a Forwarder needs.
type Config struct {
	Logger *slog.Logger // nil discards
	Target Target
	// TLS is asked at each connection to a target of the network "tls".
	TLS func() (*tls.Config, error)
	// Facility is a number of RFC 5424; Hostname, App and PID are in each message.
	Facility      int
	Hostname, App string
	PID           int
	// MaxMessage bounds a message, in bytes; 0 means DefaultMessage.
	MaxMessage int
	// Chains are those to forward, by names of their own.
	Chains func(ctx context.Context) (map[string]Chain, error)
	// Leads says whether this process is the one that forwards; nil: it is.
	Leads func() bool
	// Settle is for tests; 0 means Settle.
	Settle time.Duration
}

// Stats are a Forwarder's figures.
type Stats struct {
	// Connected tells that the last try to reach the server went well.
	Connected bool
	// Sent counts messages, those that were sent again included, Failures connections that failed or broke.
	Sent, Failures uint64
	// Oldest is the time of the oldest entry that the server has not got as far as is known; zero: it has all.
	Oldest time.Time
	// Err is why the last connection failed; "" if Connected.
	Err string
}

// Forwarder sends chains to a server.
type Forwarder struct {
	cfg Config

	mu    sync.Mutex
	stats Stats
}

// New makes a Forwarder; Run makes it work.
func New(cfg Config) *Forwarder {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxMessage == 0 {
		cfg.MaxMessage = DefaultMessage
	}
	if cfg.Target.Network == "udp" {
		cfg.MaxMessage = min(cfg.MaxMessage, mostDatagram)
	}
	if cfg.Settle == 0 {
		cfg.Settle = Settle
	}
	return &Forwarder{cfg: cfg}
}

// Stats says how it goes.
func (f *Forwarder) Stats() Stats {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stats
}

func (f *Forwarder) note(change func(*Stats)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.stats)
}

// A progress is how far a chain is.
type progress struct {
	chain Chain
	// sent is the last entry that was sent.
	sent auditchain.Head
	// parts are what was sent and not kept as delivered, oldest first.
	parts []part
}

type part struct {
	last   auditchain.Head
	oldest time.Time // of its first entry
	at     time.Time // when the server's kernel had it
}

// Run forwards until ctx ends. What fails is said in the log once, and tried again.
func (f *Forwarder) Run(ctx context.Context) {
	told := ""
	pause := firstPause
	for {
		delivered, err := f.session(ctx)
		if ctx.Err() != nil {
			return
		}
		if delivered {
			pause = firstPause
		}
		if err != nil {
			f.note(func(s *Stats) { s.Connected, s.Err, s.Failures = false, err.Error(), s.Failures+1 })
			if text := err.Error(); text != told {
				told = text
				f.cfg.Logger.Warn("audit entries not forwarded: they wait in the audit log", "to", f.cfg.Target.String(), "err", err)
			}
		} else {
			told = ""
		}
		select {
		case <-time.After(pause/2 + rand.N(pause/2)):
		case <-ctx.Done():
			return
		}
		if err != nil {
			pause = min(2*pause, longestPause)
		}
	}
}

// session forwards from the kept positions on until something fails or this process leads no more. delivered tells
// that positions moved.
func (f *Forwarder) session(ctx context.Context) (delivered bool, err error) {
	var c *conn
	defer func() { c.close() }()
	all := map[string]*progress{}
	for {
		if f.cfg.Leads != nil && !f.cfg.Leads() {
			f.note(func(s *Stats) { s.Connected, s.Oldest, s.Err = false, time.Time{}, "" })
			return delivered, nil
		}
		sent, err := f.round(ctx, &c, all)
		moved, kerr := f.keep(ctx, c, all)
		delivered = delivered || moved
		f.noteOldest(all)
		if err = errors.Join(err, kerr); err != nil {
			return delivered, err
		}
		if c != nil && c.stream && c.alive() != nil {
			// With nothing under way it is the server's right.
			for _, p := range all {
				if len(p.parts) > 0 {
					return delivered, errHungUp
				}
			}
			c.close()
			c = nil
		}
		if sent {
			continue
		}
		select {
		case <-time.After(min(lookEvery, f.cfg.Settle)):
		case <-ctx.Done():
			return delivered, context.Cause(ctx)
		}
	}
}

// round sends a page of each chain that has something.
func (f *Forwarder) round(ctx context.Context, c **conn, all map[string]*progress) (sent bool, err error) {
	chains, err := f.cfg.Chains(ctx)
	if err != nil {
		return false, fmt.Errorf("read the audit log: %w", err)
	}
	for name, chain := range chains {
		p := all[name]
		if p == nil {
			at, err := begin(ctx, chain)
			if err != nil {
				return sent, fmt.Errorf("read the audit log: %w", err)
			}
			p = &progress{sent: at}
			all[name] = p
		}
		p.chain = chain
		page, err := chain.After(ctx, p.sent.Sequence, pageEntries)
		if err != nil {
			return sent, fmt.Errorf("read the audit log: %w", err)
		}
		if len(page) == 0 {
			continue
		}
		p.parts = append(p.parts, part{last: p.sent, oldest: timeOf(page[0])})
		last := &p.parts[len(p.parts)-1]
		if *c == nil {
			if *c, err = f.cfg.dial(ctx); err != nil {
				return sent, err
			}
			f.note(func(s *Stats) {
				if !s.Connected {
					f.cfg.Logger.Info("audit entries are forwarded", "to", f.cfg.Target.String())
				}
				s.Connected, s.Err = true, ""
			})
		}
		for _, line := range page {
			message, err := f.cfg.format(line, f.cfg.MaxMessage)
			if err != nil {
				return sent, fmt.Errorf("read the audit log: %w", err)
			}
			if err := (*c).send(ctx, message); err != nil {
				return sent, err
			}
			f.note(func(s *Stats) { s.Sent++ })
		}
		if err := (*c).settled(ctx); err != nil {
			return sent, err
		}
		e, err := auditchain.Decode(page[len(page)-1])
		if err == nil {
			last.last, err = auditchain.HeadOf(e)
		}
		if err != nil {
			return sent, fmt.Errorf("read the audit log: %w", err)
		}
		last.at, p.sent, sent = time.Now(), last.last, true
	}
	return sent, nil
}

// begin is where a chain goes on: at its position, if that is still its.
func begin(ctx context.Context, chain Chain) (auditchain.Head, error) {
	at, err := chain.Position(ctx)
	if err != nil || at.Sequence == 0 {
		return auditchain.Head{}, err
	}
	page, err := chain.After(ctx, at.Sequence-1, 1)
	if err != nil || len(page) == 0 {
		return auditchain.Head{}, err
	}
	e, err := auditchain.Decode(page[0])
	if err != nil {
		return auditchain.Head{}, err
	}
	if e.Sequence > at.Sequence {
		return at, nil // it was retired, which it may be once it was delivered
	}
	if h, err := auditchain.HeadOf(e); err != nil || h != at {
		return auditchain.Head{}, err // another log: from its beginning
	}
	return at, nil
}

// keep keeps positions up to which everything was delivered long enough ago.
func (f *Forwarder) keep(ctx context.Context, c *conn, all map[string]*progress) (moved bool, err error) {
	if c == nil || c.stream && c.alive() != nil {
		return false, nil
	}
	for _, p := range all {
		n := 0
		for n < len(p.parts) && !p.parts[n].at.IsZero() && time.Since(p.parts[n].at) >= f.cfg.Settle {
			n++
		}
		if n == 0 {
			continue
		}
		if err := p.chain.Keep(ctx, p.parts[n-1].last); err != nil {
			return moved, fmt.Errorf("keep how far the audit log was forwarded: %w", err)
		}
		p.parts, moved = p.parts[n:], true
	}
	return moved, nil
}

func (f *Forwarder) noteOldest(all map[string]*progress) {
	var oldest time.Time
	for _, p := range all {
		if len(p.parts) > 0 && (oldest.IsZero() || p.parts[0].oldest.Before(oldest)) {
			oldest = p.parts[0].oldest
		}
	}
	f.note(func(s *Stats) { s.Oldest = oldest })
}
