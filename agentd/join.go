package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/postern-dev/postern/agentd/identity"
)

// keyFileName is a registration key that waits for the daemon's start, beside its
// configuration.
const keyFileName = "registration.key"

// joinUnless is join until a signal that ends the daemon comes: then stopped is true.
func joinUnless(d *Daemon, signals <-chan os.Signal) (stopped bool, err error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- d.join(ctx) }()
	for {
		select {
		case err := <-done:
			return false, err
		case s := <-signals:
			if s != syscall.SIGHUP { // there is nothing to read again yet
				cancel()
				<-done // it has registered, or not: the next start finds out
				return true, nil
			}
		}
	}
}

// join registers a host that has no identity yet with the key that waits for it, if
// there is one, and empties its file. A host that has an identity leaves the file
// alone, and so does one that has neither. ctx bounds the registration.
func (d *Daemon) join(ctx context.Context) error {
	path := filepath.Join(filepath.Dir(d.places.config), keyFileName)
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) || (err == nil && st.Size() == 0) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("registration key: %w", err)
	}
	if _, err := identity.Open(d.state); !errors.Is(err, identity.ErrNotRegistered) {
		return nil // it is Validate's to say what is wrong
	}
	if st.Mode().Perm()&0o004 != 0 {
		return fmt.Errorf("registration key %s can be read by everybody on this host: chmod 600 it, or revoke it if others may have seen it", path)
	}
	d.logger.Info("joining with the key that waits", "file", path)
	r := &registerCommand{places: d.places, keyFile: path, in: os.Stdin, out: os.Stderr, errs: os.Stderr}
	if err := r.run(ctx); err != nil {
		return fmt.Errorf("join with %s: %w", path, err)
	}
	// It may be a mount of its own, which can't be removed.
	if err := os.Truncate(path, 0); err != nil {
		d.logger.Warn("the registration key is used and still there: remove it", "file", path, "err", err)
		return nil
	}
	if err := os.Remove(path); err != nil {
		d.logger.Debug("the file of the registration key is empty and stays", "file", path, "err", err)
	}
	return nil
}
