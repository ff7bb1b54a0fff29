package main

import (
	"fmt"
	"io"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

const (
	progressAfter = time.Second
	progressEvery = 200 * time.Millisecond
)

// progress is the line on stderr that says how far a long result or a transfer is. It is
// shown on a terminal alone, and never while rows appear on a terminal themselves.
type progress struct {
	app   *app
	start time.Time
	// line is what is shown after that time.
	line func(*progress, time.Duration) string
	// onTerminal: the rows go to a terminal.
	onTerminal bool
	rowCount   atomic.Int64
	byteCount  atomic.Int64
	done       chan struct{}
	ended      chan struct{}
	once       sync.Once

	mu    sync.Mutex // guards what follows and the terminal's line
	shown bool
	muted bool
}

func startProgress(a *app, dst *destination) *progress {
	return beginProgress(a, isTerminal(dst.f), func(p *progress, d time.Duration) string {
		return progressLine(p.rowCount.Load(), p.byteCount.Load(), d)
	})
}

func beginProgress(a *app, onTerminal bool, line func(*progress, time.Duration) string) *progress {
	p := &progress{app: a, start: time.Now(), line: line, onTerminal: onTerminal, done: make(chan struct{}), ended: make(chan struct{})}
	if !isTerminal(a.stderr) {
		close(p.ended)
		return p
	}
	go p.run()
	return p
}

func (p *progress) run() {
	defer close(p.ended)
	wait := time.NewTimer(progressAfter)
	defer wait.Stop()
	for {
		select {
		case <-p.done:
			return
		case <-wait.C:
		}
		p.show()
		wait.Reset(progressEvery)
	}
}

func (p *progress) show() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.muted {
		return
	}
	p.shown = true
	fmt.Fprintf(p.app.stderr, "\r\x1b[K%s", p.line(p, time.Since(p.start))) //nolint:errcheck // nobody is left to tell
}

// progressLine is rows, volume, rate and time; without rows (arrow does not
// count them) the volume alone.
func progressLine(rows, bytes int64, d time.Duration) string {
	rate := float64(bytes) / (1 << 20) / d.Seconds()
	text := fmt.Sprintf("%.1f MiB  %.1f MiB/s  %d:%02d", float64(bytes)/(1<<20), rate, int(d.Minutes()), int(d.Seconds())%60)
	if rows > 0 {
		text = grouped(rows) + " rows  " + text
	}
	return text
}

// grouped is n with commas: 1,234,567.
func grouped(n int64) string {
	text := strconv.FormatInt(n, 10)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

func (p *progress) eraseLocked() {
	if p.shown {
		fmt.Fprint(p.app.stderr, "\r\x1b[K") //nolint:errcheck // nobody is left to tell
		p.shown = false
	}
}

// say prints a line on stderr above the line of progress.
func (p *progress) say(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.eraseLocked()
	p.app.info(format, args...)
}

// stop erases the line; it may be called again.
func (p *progress) stop() {
	p.once.Do(func() {
		close(p.done)
		<-p.ended
		p.mu.Lock()
		defer p.mu.Unlock()
		p.muted = true
		p.eraseLocked()
	})
}

func (p *progress) rows(n int64) { p.rowCount.Store(n) }

// reader counts what comes.
func (p *progress) reader(r io.Reader) io.Reader {
	return readerFunc(func(b []byte) (int, error) {
		n, err := r.Read(b)
		p.byteCount.Add(int64(n))
		return n, err
	})
}

// writer ends the line for good when rows begin to appear on a terminal.
func (p *progress) writer(w io.Writer) io.Writer {
	if !p.onTerminal {
		return w
	}
	return writerFunc(func(b []byte) (int, error) {
		p.mu.Lock()
		p.muted = true
		p.eraseLocked()
		p.mu.Unlock()
		return w.Write(b)
	})
}

type readerFunc func([]byte) (int, error)

// Read implements io.Reader.
func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

type writerFunc func([]byte) (int, error)

// Write implements io.Writer.
func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
