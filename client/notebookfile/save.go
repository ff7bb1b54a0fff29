package notebookfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/postern-dev/postern/proto/notebook"
)

// settle is how long the file that was replaced is kept for a program that had it
// open to finish writing.
const settle = 200 * time.Millisecond

// ErrChanged says that a file is not any more what the caller has read.
var ErrChanged = errors.New("the file was changed meanwhile")

// Read reads a notebook file of at most notebook.MaxFile bytes.
func Read(path string) (*notebook.Document, error) {
	data, err := readBounded(path)
	if err != nil {
		return nil, err
	}
	d, err := notebook.Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return d, nil
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, notebook.MaxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > notebook.MaxFile {
		return nil, fmt.Errorf("%s: the notebook has more than %d bytes", path, notebook.MaxFile)
	}
	return data, nil
}

// Replace puts text in the place of a file that still holds old, whole or not at
// all, and durably. What an editor saved meanwhile is never lost: then the file is
// left as the editor wrote it, and the error is ErrChanged. Links are followed, mode
// and, where permitted, owner are kept. It takes a fifth of a second.
func Replace(path string, old, text []byte) error {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	info, err := os.Stat(real)
	if err != nil {
		return err
	}
	if now, err := readBounded(real); err != nil {
		return err
	} else if !bytes.Equal(now, old) {
		return ErrChanged
	}
	tmp, err := os.CreateTemp(filepath.Dir(real), "."+filepath.Base(real)+".*.tmp")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	if err := fill(tmp, text, info); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	// The two files change places in one step; then it shows whether the old one was
	// saved once more since it was read.
	switch err := exchange(tmp.Name(), real); {
	case errors.Is(err, errors.ErrUnsupported), errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ENOSYS):
		// A file system without it: what remains is the moment between reading and renaming.
		if err := os.Rename(tmp.Name(), real); err != nil {
			return err
		}
		return syncDir(filepath.Dir(real))
	case err != nil:
		return fmt.Errorf("%s: %w", path, err)
	}
	// An editor that writes in place may have the old one open still: it is looked at
	// twice before it goes.
	for _, wait := range []time.Duration{0, settle} {
		time.Sleep(wait)
		before, err := readBounded(tmp.Name())
		if err == nil && !bytes.Equal(before, old) {
			err = ErrChanged
		}
		if err != nil {
			return errors.Join(err, giveBack(tmp.Name(), real, text))
		}
	}
	return syncDir(filepath.Dir(real))
}

// giveBack puts the file that an editor has written to after it was replaced (old) into
// its place again; unless the editor has saved once more since, into the file that is
// there now, which held text: then that is the newer one. It is looked at before and,
// as the editor may be about to, twice after.
func giveBack(old, real string, text []byte) error {
	if now, err := readBounded(real); err == nil && !bytes.Equal(now, text) {
		return nil
	}
	if err := exchange(old, real); err != nil {
		return err
	}
	for _, wait := range []time.Duration{0, settle} {
		time.Sleep(wait)
		if after, err := readBounded(old); err == nil && !bytes.Equal(after, text) {
			return exchange(old, real)
		}
	}
	return nil
}

func fill(f *os.File, text []byte, like os.FileInfo) error {
	_, err := f.Write(text)
	if err == nil {
		err = f.Chmod(like.Mode().Perm())
	}
	if owner, group, ok := ownerOf(like); ok && err == nil {
		// Only root may give files away; for others it stays theirs.
		_ = f.Chown(owner, group)
	}
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
