package notebookfile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/postern-dev/postern/proto/notebook"
)

// quiet is how long a file must be left alone before it is read: editors write in
// several steps.
const quiet = 50 * time.Millisecond

// Watch keeps the kernel of a session, and the outputs in a file, in step with the
// file's cells until ctx ends. It returns when ctx ends (nil) or when the kernel can't
// go on; a cell that fails, and a file that is no notebook for a while, are told by
// Progress.Note and waited out.
func Watch(ctx context.Context, s *notebook.Session, path string) error {
	changes, stop, err := follow(path)
	if err != nil {
		return err
	}
	defer stop()
	var bad string // what was wrong with the file when it was told last
	for ctx.Err() == nil {
		d, err := Read(path)
		if err != nil {
			if text := err.Error(); text != bad {
				bad = text
				s.Options.Progress.Notef("%s: waiting for it to be saved again", text)
			}
			wait(ctx, changes, time.Second)
			continue
		}
		bad = ""
		if s.Done(d) {
			if err := save(s, path, d, s.Results(d)); errors.Is(err, ErrChanged) {
				continue
			} else if err != nil {
				s.Options.Progress.Notef("the outputs are not written: %v", err)
			}
			wait(ctx, changes, 0)
			continue
		}
		results, err := stepWatched(ctx, s, path, d, changes)
		var failed *notebook.CellError
		if err != nil && !errors.As(err, &failed) && !errors.Is(err, errStale) {
			if ctx.Err() != nil {
				break
			}
			return err
		}
		if results != nil {
			if err := save(s, path, d, results); err != nil && !errors.Is(err, ErrChanged) {
				s.Options.Progress.Notef("the outputs are not written: %v", err)
			}
		}
	}
	return nil
}

// errStale is the cause of a cell's end when an edit took it away.
var errStale = errors.New("the cell was changed while it ran")

// stepWatched is Step, ended early when the file does not want the cell any more.
func stepWatched(ctx context.Context, s *notebook.Session, path string, d *notebook.Document, changes <-chan struct{}) (map[int]notebook.Result, error) {
	state, runs := s.Running(d)
	if !runs {
		return s.Step(ctx, d)
	}
	cell, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type outcome struct {
		results map[int]notebook.Result
		err     error
	}
	done := make(chan outcome, 1)
	go func() {
		results, err := s.Step(cell, d)
		done <- outcome{results, err}
	}()
	for {
		select {
		case o := <-done:
			return o.results, o.err
		case <-changes:
			// A file that can't be read now says nothing of what is wanted.
			if now, err := Read(path); err == nil && !notebook.Wanted(s.Spec, now, state) {
				cancel(errStale)
			}
		}
	}
}

// save writes results into the file if that changes anything.
func save(s *notebook.Session, path string, d *notebook.Document, results map[int]notebook.Result) error {
	text, err := d.With(results)
	if err != nil {
		return err
	}
	if bytes.Equal(text, d.Bytes()) {
		return nil
	}
	if err := Replace(path, d.Bytes(), text); err != nil {
		return err
	}
	if s.Options.Progress.Saved != nil {
		s.Options.Progress.Saved()
	}
	return nil
}

// follow tells of changes to a file, and of others put in its place.
func follow(path string) (changes <-chan struct{}, stop func(), err error) {
	real, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("%s: no such file", path)
	}
	if err == nil {
		real, err = filepath.Abs(real)
	}
	if err != nil {
		return nil, nil, err
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, nil, fmt.Errorf("watching %s: %w", path, err)
	}
	// The directory: many editors rename a new file over the old one.
	if err := w.Add(filepath.Dir(real)); err != nil {
		_ = w.Close()
		return nil, nil, fmt.Errorf("watching %s: %w", path, err)
	}
	out := make(chan struct{}, 1)
	tell := func() {
		select {
		case out <- struct{}{}:
		default:
		}
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		timer := time.NewTimer(time.Hour)
		timer.Stop()
		for {
			select {
			case e, ok := <-w.Events:
				if !ok {
					return
				}
				if e.Name == real {
					timer.Reset(quiet)
				}
			case _, ok := <-w.Errors: // events were lost: the file is read again
				if !ok {
					return
				}
				timer.Reset(quiet)
			case <-timer.C:
				tell()
			}
		}
	}()
	return out, func() { _ = w.Close(); <-ended }, nil
}

// wait returns when a change was told, ctx ended, or most has passed (0: no bound).
func wait(ctx context.Context, changes <-chan struct{}, most time.Duration) {
	var late <-chan time.Time
	if most > 0 {
		t := time.NewTimer(most)
		defer t.Stop()
		late = t.C
	}
	select {
	case <-ctx.Done():
	case <-changes:
	case <-late:
	}
}
