package bundle

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Bounds of a bundle, in bytes: of one file, and of a listing's entries.
const (
	MaxFile    = 8 << 20
	maxEntries = 5000
)

// Writer writes a bundle. Commit or Abandon it.
type Writer struct {
	path   string
	temp   *os.File
	zip    *gzip.Writer
	tar    *tar.Writer
	redact *Redactor
	prefix string
	now    time.Time
}

// Create begins a bundle at path, which must not be there; it is 0600 and there at Commit,
// whole or not at all.
func Create(path string, r *Redactor) (*Writer, error) {
	if _, err := os.Lstat(path); err == nil {
		return nil, fmt.Errorf("%s is there already: name another file", path)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	temp, err := os.CreateTemp(filepath.Dir(path), ".postern-bundle-*") // 0600
	if err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	z := gzip.NewWriter(temp)
	now := time.Now()
	return &Writer{path: path, temp: temp, zip: z, tar: tar.NewWriter(z), redact: r, prefix: "postern-support/", now: now}, nil
}

// Text adds a file, with secrets taken out; what is above MaxFile is cut off from its beginning, for
// the end of a log is what counts.
func (w *Writer) Text(name, text string) error {
	text = w.redact.Text(text)
	if len(text) > MaxFile {
		text = "[the beginning is left out]\n" + text[len(text)-MaxFile:]
	}
	if err := w.tar.WriteHeader(&tar.Header{Name: w.prefix + name, Mode: 0o600, Size: int64(len(text)), ModTime: w.now, Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	_, err := w.tar.Write([]byte(text))
	return err
}

// JSON adds a value, likewise.
func (w *Writer) JSON(name string, v any) error {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return w.Text(name, string(raw)+"\n")
}

// Config adds a configuration as Redactor.YAML leaves it.
func (w *Writer) Config(name string, raw []byte) error {
	text, err := w.redact.YAML(raw)
	if err != nil {
		text = []byte("# " + err.Error() + "\n")
	}
	return w.Text(name, string(text))
}

// Entry is a file of a listing.
type Entry struct {
	Path     string    `json:"path"`
	Mode     string    `json:"mode"`
	Bytes    int64     `json:"bytes"`
	Modified time.Time `json:"modified"`
}

// Listing is what files there are below a directory, never what is in them: at most 5000.
func Listing(dir string) (entries []Entry, cut bool) {
	filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error { //nolint:errcheck // what can't be read is not listed
		if err != nil {
			return nil //nolint:nilerr // likewise
		}
		if len(entries) >= maxEntries {
			cut = true
			return fs.SkipAll
		}
		if info, err := d.Info(); err == nil {
			rel, rerr := filepath.Rel(dir, path)
			if rerr != nil {
				rel = path
			}
			entries = append(entries, Entry{rel, info.Mode().String(), info.Size(), info.ModTime().UTC()})
		}
		return nil
	})
	return entries, cut
}

// Commit puts the bundle in its place.
func (w *Writer) Commit() error {
	err := errors.Join(w.tar.Close(), w.zip.Close(), w.temp.Sync(), w.temp.Close())
	if err == nil {
		// A link, not a rename: what somebody else has put there meanwhile stays.
		err = os.Link(w.temp.Name(), w.path)
	}
	return errors.Join(err, os.Remove(w.temp.Name()))
}

// Abandon removes what was written.
func (w *Writer) Abandon() error { return errors.Join(w.temp.Close(), os.Remove(w.temp.Name())) }
