package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

// destination is where a result goes: stdout, or a file that appears under its
// name only when it is whole.
type destination struct {
	f *os.File
	// final is the name to get; empty for what is written in place.
	final string
	owned bool
	name  string
	// touched is set by the first byte.
	touched bool
	// w is written to instead of f; optional.
	w io.Writer
}

// destination opens the file called name, or stdout if name is empty. What exists
// and is not a regular file (/dev/null, a pipe) is written in place.
func (a *app) destination(name string) (*destination, error) {
	if name == "" || name == "-" {
		return &destination{f: a.stdout, name: "stdout"}, nil
	}
	info, err := os.Stat(name)
	switch {
	case err == nil && info.IsDir():
		return nil, usagef("-O %s is a directory: name a file", name)
	case err == nil && !info.Mode().IsRegular():
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return nil, fmt.Errorf("write the result: %w", err)
		}
		return &destination{f: f, owned: true, name: name}, nil
	case err == nil: // through a link to the file itself
		if name, err = filepath.EvalSymlinks(name); err != nil {
			return nil, fmt.Errorf("write the result: %w", err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("write the result: %w", err)
	}
	// Not os.CreateTemp: the umask alone says who may read the result.
	tmp := filepath.Join(filepath.Dir(name), "."+filepath.Base(name)+".tmp-"+strconv.Itoa(os.Getpid()))
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return nil, fmt.Errorf("write the result: %w", err)
	}
	if info != nil {
		if err := f.Chmod(info.Mode().Perm()); err != nil {
			f.Close()      //nolint:errcheck // nothing is in it
			os.Remove(tmp) //nolint:errcheck // it is only rubbish
			return nil, fmt.Errorf("write the result: %w", err)
		}
	}
	return &destination{f: f, final: name, owned: true, name: name}, nil
}

// Write implements io.Writer.
func (d *destination) Write(p []byte) (int, error) {
	d.touched = d.touched || len(p) > 0
	if d.w != nil {
		return d.w.Write(p)
	}
	return d.f.Write(p)
}

// failed says where writing failed; a reader that has gone stays recognisable.
func (d *destination) failed(err error) error {
	if errors.Is(err, syscall.EPIPE) && !d.owned {
		return err
	}
	var path *fs.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	return fmt.Errorf("write the result to %s: %w", d.name, err)
}

// commit ends a result that is whole.
func (d *destination) commit() error {
	if !d.owned {
		return nil
	}
	if d.final == "" {
		if err := d.f.Close(); err != nil {
			return d.failed(err)
		}
		return nil
	}
	err := d.f.Sync()
	if cerr := d.f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(d.f.Name(), d.final)
	}
	if err != nil {
		os.Remove(d.f.Name()) //nolint:errcheck // it is only rubbish
		return d.failed(err)
	}
	return nil
}

// discard gives up a result that is not whole.
func (d *destination) discard() {
	if !d.owned {
		return
	}
	d.f.Close() //nolint:errcheck // it is given up
	if d.final != "" {
		os.Remove(d.f.Name()) //nolint:errcheck // it is only rubbish
	}
}
